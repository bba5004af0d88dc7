"""The ortho stream: tiny, high precision, removable.

One stream of one layer is up to two parts that share one alpha:

    support   whole input columns (:class:`Columns`) or free entries in CSR form (:class:`Entries`)
    tail      the singular directions that a low-rank base dropped, as factors (:class:`Factors`)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from libortho.core.ops import library, native
from libortho.core.ops.derived import Derived
from libortho.core.ops.ortho import Alpha, add_columns, add_factors, add_sparse, wants_wide

MAX_RANK = 512
"""Largest LoRA rank that vLLM serves."""


class Columns(nn.Module):
    """``k`` whole input columns of the weight: index (k,) int32, values (k, out_features)."""

    index: Tensor
    values: Tensor

    def __init__(self, index: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index.to(torch.int32))
        self.register_buffer("values", values.contiguous())
        self._wide: Derived[Tensor] = Derived()

    def forward(self, y: Tensor, x: Tensor, alpha: Alpha) -> Tensor:
        """Add the part to ``y`` in place."""
        buffers = self._buffers  # here and below, not by attribute: that search takes longer than the kernel
        index, values, wide = buffers["index"], buffers["values"], None
        assert index is not None
        assert values is not None
        if (native.add_columns is None or values.dtype is not torch.bfloat16) and wants_wide(x):
            wide = self._wide.get(Tensor.float, values)
        return add_columns(y, x, index, values, alpha, wide)

    def traced(self, y: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
        """:meth:`forward` through the operator; alpha (sequences,)."""
        return library.add_columns(y, x, self.index, self.values, alpha)

    def add_to(self, weight: Tensor) -> None:
        """Add the part to a dense fp32 weight (out_features, in_features) in place."""
        weight.index_add_(1, self.index, self.values.to(weight.dtype).T)


class Entries(nn.Module):
    """Free entries in CSR form: rows (out_features + 1,), columns (entries,) int32, values (entries,)."""

    rows: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows.to(torch.int32))
        self.register_buffer("columns", columns.to(torch.int32))
        self.register_buffer("values", values)

    @classmethod
    def from_mask(cls, residual: Tensor, mask: Tensor, dtype: torch.dtype) -> Entries:
        """Take ``residual`` (out_features, in_features) where ``mask`` is True."""
        counts = mask.sum(1)
        rows = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
        rows[1:] = counts.cumsum(0)
        return cls(rows, mask.nonzero()[:, 1], residual[mask].to(dtype))

    def forward(self, y: Tensor, x: Tensor, alpha: Alpha) -> Tensor:
        """Add the part to ``y`` in place."""
        return add_sparse(y, x, self.rows, self.columns, self.values, alpha)

    def traced(self, y: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
        """:meth:`forward` through the operator; alpha (sequences,)."""
        return library.add_entries(y, x, self.rows, self.columns, self.values, alpha)

    def add_to(self, weight: Tensor) -> None:
        """Add the part to a dense fp32 weight (out_features, in_features) in place."""
        row_of = torch.repeat_interleave(torch.arange(weight.shape[0], device=weight.device), self.rows.diff().long())
        weight.index_put_((row_of, self.columns.long()), self.values.to(weight.dtype), accumulate=True)


class Factors(nn.Module):
    """Low-rank part: down (rank, in_features), up (out_features, rank)."""

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down.contiguous())
        self.register_buffer("up", up.contiguous())

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.down.shape[0]

    def forward(self, y: Tensor, x: Tensor, alpha: Alpha) -> Tensor:
        """Add the part to ``y`` in place."""
        return add_factors(y, x, self.down, self.up, alpha)

    def traced(self, y: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
        """:meth:`forward` through the operator; alpha (sequences,)."""
        return library.add_factors(y, x, self.down, self.up, alpha)

    def add_to(self, weight: Tensor) -> None:
        """Add the part to a dense fp32 weight (out_features, in_features) in place."""
        weight.addmm_(self.up.to(weight.dtype), self.down.to(weight.dtype))


class OrthoStream(nn.Module):
    """One named stream of one layer: a support, a tail, or both."""

    def __init__(self, support: Columns | Entries | None = None, tail: Factors | None = None) -> None:
        super().__init__()
        self.support = support
        self.tail = tail

    @property
    def support_size(self) -> int:
        """Entries of the weight that the support covers, as stored."""
        return 0 if self.support is None else self.support.values.numel()

    @property
    def tail_size(self) -> int:
        """Stored values of the tail."""
        return 0 if self.tail is None else self.tail.down.numel() + self.tail.up.numel()

    @property
    def nbytes(self) -> int:
        """Bytes as stored, indices included."""
        return sum(b.nbytes for b in self.buffers())

    def forward(self, y: Tensor, x: Tensor, alpha: Alpha) -> Tensor:
        """``y += alpha * W_ortho x`` in place, for y (tokens, out_features) and x (tokens, in_features)."""
        parts = self._modules
        if (tail := parts.get("tail")) is not None:
            y = tail.forward(y, x, alpha)
        if (support := parts.get("support")) is not None:
            y = support.forward(y, x, alpha)
        return y

    def traced(self, y: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
        """:meth:`forward` through the operators; alpha (sequences,), read when the graph runs."""
        for part in (self.tail, self.support):
            if part is not None:
                y = part.traced(y, x, alpha)
        return y

    def add_to(self, weight: Tensor) -> None:
        """Add the stream to a dense fp32 weight (out_features, in_features) in place."""
        for part in (self.tail, self.support):
            if part is not None:
                part.add_to(weight)
