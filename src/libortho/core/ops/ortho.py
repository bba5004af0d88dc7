"""What an ortho stream adds to the base product, in place: ``y += alpha * W_ortho x``.

``alpha`` is a float, or (tokens, 1) for values that differ between sequences; it scales the gathered inputs, which are
few, and not the outputs. Tokens at alpha = 0 are left out by selection, in both directions: a product with zero would
carry what overflows in a stream (inf, NaN) into them. For few tokens the columns are computed in fp32 on a CPU
(:mod:`libortho.core.ops.cpu`), and by one kernel on a GPU (:mod:`libortho.core.ops.triton`).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from libortho.core.ops import native, triton
from libortho.core.ops.cpu import WIDE_TOKENS, few

Alpha = float | Tensor

with warnings.catch_warnings():
    # torch says once per process that its CSR tensors are in beta; nothing that a caller of ours could act on.
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def add_columns(
    y: Tensor, x: Tensor, index: Tensor, values: Tensor, alpha: Alpha, wide: Tensor | None = None
) -> Tensor:
    """Whole input columns: ``y += alpha * x[:, index] @ values``.

    Args:
        y: (tokens, out_features), changed in place.
        x: (tokens, in_features).
        index: (k,) int, the input columns.
        values: (k, out_features).
        alpha: Float or (tokens, 1).
        wide: The values in fp32, used where :func:`wants_wide` says so.
    """
    if x.is_cuda and triton.takes(x, y, values):
        return triton.add_columns(y, x, index, values, alpha)
    if wide is None and native.add_columns is not None and native.add_columns(y, x, index, values, alpha) is not None:
        return y
    gathered = x.index_select(1, index)
    if wide is not None and wants_wide(x):
        gathered = gathered.float()
        if isinstance(alpha, Tensor):
            off = alpha == 0
            return _select(y, y + torch.mm((gathered * alpha).masked_fill_(off, 0), wide), off)
        return y.add_(torch.mm(gathered, wide), alpha=alpha)
    gathered = gathered.to(y.dtype)  # under autocast, x is wider than y
    if isinstance(alpha, Tensor):
        off = alpha == 0
        gathered = (gathered * alpha.to(y.dtype)).masked_fill(off, 0)
        return _select(y, torch.addmm(y, gathered, values.to(y.dtype)), off)
    return y.addmm_(gathered, values.to(y.dtype), alpha=alpha)


def _select(y: Tensor, total: Tensor, off: Tensor) -> Tensor:
    """``total`` in place of ``y``, but for the tokens that are ``off``, (tokens, 1) bool; no gradient of those."""
    return y.copy_(torch.where(off, y, total))


def wants_wide(x: Tensor) -> bool:
    """True if ``x`` (tokens, in_features) is so few bf16 tokens that fp32 values are faster."""
    return few(x, WIDE_TOKENS)


def add_factors(y: Tensor, x: Tensor, down: Tensor, up: Tensor, alpha: Alpha) -> Tensor:
    """Low-rank part: ``y += alpha * (x @ down^T) @ up^T``; down (rank, in_features), up (out_features, rank)."""
    if isinstance(alpha, Tensor):
        off = alpha == 0
        hidden = (x.masked_fill(off, 0) @ down.to(x.dtype).T).to(y.dtype)
        hidden = (hidden * alpha.to(y.dtype)).masked_fill(off, 0)
        return _select(y, torch.addmm(y, hidden, up.to(y.dtype).T), off)
    hidden = (x @ down.to(x.dtype).T).to(y.dtype)
    return y.addmm_(hidden, up.to(y.dtype).T, alpha=alpha)


def add_sparse(y: Tensor, x: Tensor, rows: Tensor, columns: Tensor, values: Tensor, alpha: Alpha) -> Tensor:
    """Free entries in CSR form: ``y += alpha * x @ S^T``, computed in fp32 (CPU CSR kernels know no bf16).

    Args:
        y: (tokens, out_features), changed in place.
        x: (tokens, in_features).
        rows: (out_features + 1,) int32 row pointers.
        columns: (entries,) int32 column indices.
        values: (entries,).
        alpha: Float or (tokens, 1).
    """
    if isinstance(alpha, Tensor):
        off = alpha == 0
        product = SparseProduct.apply(x.float().masked_fill(off, 0), rows, columns, values.float())
        return _select(y, y + (product * alpha).to(y.dtype), off)
    product = SparseProduct.apply(x.float(), rows, columns, values.float())
    return y.add_((product * alpha).to(y.dtype))


class SparseProduct(torch.autograd.Function):
    """``x @ S^T`` with gradients to ``x``; the entries themselves are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
        """The product, with what the backward pass needs kept in ``ctx``."""
        ctx.save_for_backward(rows, columns, values)
        ctx.in_features = x.shape[1]
        shape = (len(rows) - 1, x.shape[1])
        matrix = torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)
        return _times(matrix, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient for ``x`` alone."""
        rows, columns, values = ctx.saved_tensors
        return sparse_gradient(grads[0], rows, columns, values, ctx.in_features), None, None, None


def sparse_gradient(grad: Tensor, rows: Tensor, columns: Tensor, values: Tensor, in_features: int) -> Tensor:
    """Gradient of ``x @ S^T`` for ``x``, (tokens, in_features), in fp32."""
    shape = (in_features, len(rows) - 1)  # the CSR arrays of S, read by columns, are S^T
    return _times(torch.sparse_csc_tensor(rows, columns, values, shape, check_invariants=False), grad)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """``x @ matrix^T`` for a sparse matrix, in the dtype of ``x`` even under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return (matrix @ x.T).T
