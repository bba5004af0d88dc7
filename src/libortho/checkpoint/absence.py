"""Search files for anything of a stream that was to be removed.

A stream is cut into runs of nine values and sixteen bytes, and a hash of each run is looked up at every place of what
was written:

    values   in each floating-point tensor, along rows and along columns, zeros left out; a run has the same hash if it
             is negated or scaled by a power of two, and the runs of the stream are also kept rounded to bf16 and fp16
    bytes    in each file, at every offset; in files that hold no tensors also decoded from hexadecimal and base64, and
             from numbers in decimal
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from libortho.checkpoint.json_files import open_regular
from libortho.checkpoint.stream_files import StreamFile
from libortho.core.streams import Columns, OrthoStream

VALUES = 9
"""Values in a run that is looked up."""
BYTES = 16
"""Bytes in a run that is looked up."""
_EVERY = 2**12  # up to so many values, runs begin at each of them; beyond, at every eighth
_STEP = 8
_CHUNK = 2**15 - 64  # stays in a processor's cache, and torch takes no second thread for it, which would cost more
_READ = 2**24
_INFINITE = 0x7F800000
_MOST_BITS = 30
_SHIFTS = (30, 3)  # of the bits of a hash that a filter reads
_DISTINCT_VALUES, _DISTINCT_BYTES = 5, 8  # of a run, so that what is common (zeros, ones, ramps) is nobody's secret
_ODD = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number
_POWERS = tuple((pow(_ODD, e, 2**64) + 2**63) % 2**64 - 2**63 for e in (1, 2, 4))
_HEX = re.compile(rb"[^0-9A-Fa-f]")
_BASE64 = re.compile(rb"[^0-9A-Za-z+/]")
_NUMBER = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class _Runs:
    """Hashes of runs, sorted, each with the number of its stream.

    A Bloom filter before them, small enough for a processor's cache, tells nearly all others at a glance.
    """

    hashes: Tensor
    owners: Tensor
    filter: Tensor

    @classmethod
    def of(cls, found: list[tuple[int, Tensor]]) -> _Runs:
        hashes = torch.cat([torch.empty(0, dtype=torch.int64), *(h for _, h in found)])
        owners = torch.cat([torch.empty(0, dtype=torch.int64), *(torch.full((len(h),), n) for n, h in found)])
        hashes, order = hashes.sort()
        first = torch.ones(len(hashes), dtype=torch.bool)
        first[1:] = hashes[1:] != hashes[:-1]
        hashes, order = hashes[first], order[first]
        bits = min(_MOST_BITS, len(hashes).bit_length() + 5)
        flags = torch.zeros(2**bits, dtype=torch.bool)
        for shift in _SHIFTS:
            flags[(hashes >> shift) & (2**bits - 1)] = True
        weights = 2 ** torch.arange(8, dtype=torch.uint8)
        return cls(hashes, owners[order], (flags.view(-1, 8) * weights).sum(1, dtype=torch.uint8))

    def owner(self, hashes: Tensor) -> int | None:
        """The stream to which one of the hashes belongs."""
        for shift in _SHIFTS:
            places = (hashes >> shift) & (8 * len(self.filter) - 1)
            bit = self.filter.index_select(0, places >> 3) >> (places & 7).to(torch.uint8)
            hashes = hashes[(bit & 1).bool()]
        if not len(hashes) or not len(self.hashes):
            return None
        places = torch.searchsorted(self.hashes, hashes).clamp(max=len(self.hashes) - 1)
        same = (self.hashes[places] == hashes).nonzero()
        return int(self.owners[places[same[0, 0]]]) if len(same) else None


class Traces:
    """Hashes of the values and bytes of streams, by which parts of them are found in tensors and files.

    Args:
        streams: The streams to look for, by name.
    """

    def __init__(self, streams: Mapping[str, StreamFile]) -> None:
        self._names = list(streams)
        values: list[tuple[int, Tensor]] = []
        raw: list[tuple[int, Tensor]] = []
        for place, stream in enumerate(streams.values()):
            for part in stream.layers.values():
                for tensor in _tensors(part):
                    values += [(place, h) for form in _rounded(tensor) for h in _value_needles(form)]
                    raw += [(place, _byte_needles(t)) for t in (tensor, tensor.T if tensor.dim() == 2 else tensor)]
        self._values, self._raw = _Runs.of(values), _Runs.of(raw)

    def in_tensor(self, tensor: Tensor) -> str | None:
        """The stream of which a floating-point tensor holds a run of values; None if there is none."""
        views = (tensor, tensor.T) if tensor.dim() == 2 else (tensor,)
        return self._name(n for view in views for n in _find(view.reshape(-1), self._values))

    def in_bytes(self, content: bytes) -> str | None:
        """The stream of which the content holds a run of bytes; None if there is none."""
        return self._name(_find_bytes(content, self._raw))

    def in_file(self, path: Path) -> str | None:
        """The stream of which a file holds a run of bytes; None if there is none.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        with open_regular(path) as file:
            kept = b""
            while chunk := file.read(_READ):
                if (name := self.in_bytes(kept + chunk)) is not None:
                    return name
                kept = chunk[1 - BYTES :]
        return None

    def in_text(self, content: bytes) -> str | None:
        """The stream of which the content holds a run, written as it is or as text; None if there is none."""
        for decode in _DECODERS:
            for decoded in decode(content):
                if (name := self.in_bytes(decoded)) is not None:
                    return name
        numbers = torch.tensor([_float(n) for n in _NUMBER.findall(content)], dtype=torch.float32)
        return self.in_tensor(numbers)

    def _name(self, owners: Iterator[int]) -> str | None:
        owner = next(owners, None)
        return None if owner is None else self._names[owner]


def _tensors(part: OrthoStream) -> list[Tensor]:
    """Tensors that carry the information of one layer's part: each factor alone, and as the LoRA joins them."""
    tail, support = part.tail, part.support
    tensors = [] if tail is None else [tail.down, tail.up]
    if support is not None:
        tensors.append(support.values)
    if tail is not None and isinstance(support, Columns):
        tensors.append(torch.cat([support.values.T, tail.up.to(support.values.dtype)], 1))
    return [t.detach().cpu() for t in tensors]


# -- runs of values ----------------------------------------------------------------------------------------------------


def _rounded(tensor: Tensor) -> list[Tensor]:
    """The values in float32, as they are and as rounding to bf16 and fp16 leaves them, scaled first or not."""
    exact = tensor.float()
    bits = exact.contiguous().view(torch.int32)
    eleven = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF  # fp16 without its limits of exponent
    forms = [exact, exact.bfloat16().float(), eleven.view(torch.float32), exact.half().float()]
    return [f for i, f in enumerate(forms) if not any(torch.equal(f, other) for other in forms[:i])]


def _value_needles(tensor: Tensor) -> Iterator[Tensor]:
    """Hashes of the runs of a matrix along rows and along columns, or of a vector."""
    step = 1 if tensor.numel() <= _EVERY else _STEP
    for view in (tensor, tensor.T) if tensor.dim() == 2 else (tensor,):
        flat = _plain(view.reshape(-1))
        if len(flat) < VALUES:
            continue
        mantissas = (flat.view(torch.int32) & 0x7FFFFF).unfold(0, VALUES, step)
        distinct = (mantissas.sort(1).values.diff(dim=1) != 0).sum(1) + 1
        yield _value_hashes(flat)[::step][distinct >= _DISTINCT_VALUES].unique()


def _plain(flat: Tensor) -> Tensor:
    """Values in float32 without zeros, NaN and infinities."""
    values = flat.float().contiguous()
    magnitudes = values.view(torch.int32) & 0x7FFFFFFF
    if not len(values):
        return values
    least, most = magnitudes.aminmax()
    if least > 0 and most < _INFINITE:
        return values
    return values[(magnitudes > 0) & (magnitudes < _INFINITE)]


def _value_hashes(flat: Tensor) -> Tensor:
    """Hash of each run of a vector without zeros: of the mantissas, and of what exponents and signs differ by.

    The polynomial over eight steps is built by doubling; neither a scale nor a sign of the whole run enters it.
    """
    bits = flat.view(torch.int32)
    exponent = ((bits >> 23) & 0xFF).diff() + 256
    high = exponent + ((bits[1:] ^ bits[:-1]) < 0) * 512
    total = _mixed((high.long() << 23) + (bits[1:] & 0x7FFFFF))
    for width, power in zip((1, 2, 4), _POWERS, strict=True):
        total = total[:-width] * power + total[width:]
    return total


def _find(flat: Tensor, runs: _Runs) -> Iterator[int]:
    """Owners of the runs that a vector holds, chunk by chunk."""
    kept = torch.empty(0)
    for chunk in flat.split(_CHUNK):
        values = torch.cat([kept, _plain(chunk)])
        if len(values) >= VALUES:
            owner = runs.owner(_value_hashes(values))
            if owner is not None:
                yield owner
        kept = values[1 - VALUES :]


# -- runs of bytes -----------------------------------------------------------------------------------------------------


def _byte_needles(tensor: Tensor) -> Tensor:
    """Hashes of consecutive runs of the bytes of a tensor."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    runs = content[: len(content) // BYTES * BYTES].reshape(-1, BYTES)
    distinct = (runs.sort(1).values.diff(dim=1) != 0).sum(1) + 1
    words = runs[distinct >= _DISTINCT_BYTES].contiguous().view(torch.int64)
    return _byte_hashes(_mixed(words[:, 0]), _mixed(words[:, 1])).unique()


def _byte_hashes(first: Tensor, second: Tensor) -> Tensor:
    return first * _ODD + second


def _find_bytes(content: bytes, runs: _Runs) -> Iterator[int]:
    """Owners of the runs that the content holds, at any offset."""
    step = 8 * _CHUNK
    for begin in range(0, max(1, len(content) - BYTES + 1), step):
        piece = content[begin : begin + step + BYTES]
        for offset in range(8):
            size = (len(piece) - offset) // 8 * 8
            if size < BYTES:
                continue
            words = _mixed(torch.frombuffer(bytearray(piece[offset : offset + size]), dtype=torch.int64))
            owner = runs.owner(_byte_hashes(words[:-1], words[1:]))
            if owner is not None:
                yield owner


def _as_it_is(content: bytes) -> Iterator[bytes]:
    yield content


def _from_hex(content: bytes) -> Iterator[bytes]:
    digits = _HEX.sub(b"", content)
    for begin in (0, 1):
        text = digits[begin:]
        yield bytes.fromhex(text[: len(text) // 2 * 2].decode("ascii"))


def _from_base64(content: bytes) -> Iterator[bytes]:
    signs = _BASE64.sub(b"", content.replace(b"\\n", b"").replace(b"\\r", b"").translate(_URL_SAFE))
    for begin in range(4):
        text = signs[begin:]
        yield base64.b64decode(text[: len(text) // 4 * 4])


def _from_decimal(content: bytes) -> Iterator[bytes]:
    numbers = (int(n) for n in _NUMBER.findall(content) if n.isdigit() and len(n) < 4)
    yield bytes(n for n in numbers if n < 256)


_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_DECODERS: tuple[Callable[[bytes], Iterator[bytes]], ...] = (_as_it_is, _from_hex, _from_base64, _from_decimal)


def _float(number: bytes) -> float:
    return float(number[:400])


# -- hashes ------------------------------------------------------------------------------------------------------------


def _mixed(words: Tensor) -> Tensor:
    """Each 64-bit word with its bits spread, so that sums of multiples of them tell words apart."""
    words = words * _ODD
    return words ^ (words >> 32)
