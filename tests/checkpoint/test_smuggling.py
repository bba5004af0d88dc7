"""Ways to keep a removed stream in what ``detach`` writes: each is refused, or named as not checked.

Each prepares the source, with all hashes made to fit, as somebody does who knows the format. What is changed after
``detach`` is in test_forged_certificate.py.
"""

import base64
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import (
    EMBEDDING,
    LAYER,
    NORM,
    STREAM,
    WEIGHTS,
    blob,
    described,
    header,
    index_beside,
    kept,
    listed,
    manifest,
    put,
    raw,
    replaced,
    tensors,
    text,
    values,
)
from making import edit, write

from libortho import CheckpointError
from libortho.checkpoint import attach, detach, verify_certificate


def as_codes(t: dict[str, torch.Tensor], d: Path) -> None:
    """The bytes of a column in the packed codes."""
    t[f"{LAYER}.weight_packed"].view(torch.uint8)[:2] = values(d).contiguous().view(torch.uint8).reshape(2, 64)


def doubled_key(d: Path) -> None:
    replaced("libortho.json", '"bits"', f'"base_sha256": "{blob(d)}", "bits"')(d)


def shards(d: Path) -> None:
    index_beside(d, lambda t: t[EMBEDDING].__setitem__(9, values(d)))
    names = ("model-00001-of-00001.safetensors", "model.safetensors.index.json")
    edit(d / "libortho.json", lambda m: m["files"].update(dict.fromkeys(names)))


def scattered(t: dict[str, torch.Tensor], d: Path) -> None:
    t[EMBEDDING][:32, 3] = values(d)[torch.randperm(32)]


def in_halves(t: dict[str, torch.Tensor], d: Path) -> None:
    t[EMBEDDING][5] = torch.randn(32)
    t[EMBEDDING][6] = values(d) - t[EMBEDDING][5]


NOT_WORDS = "what these files say"
OTHERWISE = "values that were encoded in another way"
REFUSED = None
BEFORE: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "unknown key in libortho.json": (manifest(lambda m, d: m.update(note=blob(d))), REFUSED),
    "unknown key of a layer": (manifest(lambda m, d: m["layers"][LAYER].update(note=blob(d))), REFUSED),
    "unknown key of a report": (manifest(lambda m, d: m["layers"][LAYER]["report"].update(note=1.5)), REFUSED),
    "the same key twice": (doubled_key, REFUSED),
    "a version": (manifest(lambda m, d: m["libraries"].update(torch=blob(d))), REFUSED),
    "a further library": (manifest(lambda m, d: m["libraries"].update(note=blob(d))), REFUSED),
    "a number of very many digits": (
        manifest(lambda m, d: m["layers"][LAYER]["report"].update(base_bytes=int.from_bytes(raw(d)[:1000]))), REFUSED,
    ),
    "digits that no number has": (
        replaced("libortho.json", '"base_bytes": ', '"base_bytes": 1e0, "low_rank_error": 0.5'), REFUSED,
    ),
    "blanks in libortho.json": (lambda d: (d / "libortho.json").open("a").write(" \t" * 4000), REFUSED),
    "escapes in libortho.json": (replaced("libortho.json", '"files"', '"\\u0066iles"'), REFUSED),
    "the size of a stream in the report of the base": (
        manifest(lambda m, d: m["layers"][LAYER]["report"].update(ortho_density=0.125)), REFUSED,
    ),
    "metadata of the weights": (
        described(format="pt", note="MTIzNDU2Nzg5" * 99), REFUSED,
    ),
    "another format in the metadata": (described(format="bm90IGEgc2VjcmV0"), REFUSED),
    "blanks behind the header": (header(lambda h: h + " " * 800), REFUSED),
    "blanks inside the header": (header(lambda h: h.replace(":", ": ")), REFUSED),
    "a further key in the header": (header(lambda h: h.replace('"dtype"', '"note":"MTIz","dtype"', 1)), REFUSED),
    "bytes behind the tensors": (lambda d: (d / WEIGHTS).open("ab").write(raw(d)), REFUSED),
    "a tensor that the model has not": (tensors(lambda t, d: t.update(note=values(d) * 1.1)), REFUSED),
    "a tensor that transformers ignores": (
        tensors(lambda t, d: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": values(d) * 1.1})), REFUSED,
    ),
    "a larger tensor": (
        tensors(lambda t, d: t.update({NORM: torch.cat([t[NORM], values(d) * 1.1])})), REFUSED,
    ),
    "a tensor in float64": (tensors(lambda t, d: t.update({NORM: t[NORM].double()})), REFUSED),
    "a tensor of bytes": (tensors(lambda t, d: t.update({NORM: t[NORM].view(torch.int32)})), REFUSED),
    "NaN that carry bits": (tensors(lambda t, d: t[NORM].view(torch.int32).fill_(0x7FC12345)), REFUSED),
    "another weight_shape": (tensors(lambda t, d: t[f"{LAYER}.weight_shape"].fill_(9)), REFUSED),
    "a row of the embeddings": (put(lambda v: v), REFUSED),
    "negated": (put(lambda v: -v), REFUSED),
    "doubled": (put(lambda v: 2 * v), REFUSED),
    "an eighth, negated": (put(lambda v: -v / 8), REFUSED),
    "rounded to bf16": (put(lambda v: v.bfloat16()), REFUSED),
    "rounded to fp16": (put(lambda v: v.half()), REFUSED),
    "rounded to fp16 and scaled": (put(lambda v: -4 * v.half().float()), REFUSED),
    "half a column": (put(lambda v: torch.cat([v[:16], torch.randn(16)])), REFUSED),
    "a column at another place": (
        tensors(lambda t, d: t[EMBEDDING].view(-1)[77 : 77 + 32].copy_(values(d))), REFUSED,
    ),
    "a column down the embeddings": (tensors(lambda t, d: t[EMBEDDING][3:35, 7].copy_(values(d))), REFUSED),
    "a column between zeros": (
        tensors(lambda t, d: t[EMBEDDING].view(-1)[:64].copy_(torch.stack([values(d), 0 * values(d)], 1).view(-1))),
        REFUSED,
    ),
    "bytes as integer codes": (tensors(as_codes), REFUSED),
    "an unlisted file": (lambda d: (d / "notes.bin").write_bytes(raw(d)), REFUSED),
    "a listed file, one byte before the stream": (listed("notes.bin", lambda d: b"x" + raw(d)), REFUSED),
    "a listed vocabulary, one byte before the stream": (listed("vocab.txt", lambda d: b"x" + raw(d)), REFUSED),
    "a listed adapter": (listed("adapter_model.safetensors", raw), REFUSED),
    "other weights with their index": (shards, REFUSED),
    "pytorch_model.bin": (listed("pytorch_model.bin", raw), REFUSED),
    "a link to the stream": (
        lambda d: (os.symlink(d / STREAM, d / "merges.txt"), listed("merges.txt", raw)(d)), REFUSED,
    ),
    "a folder link": (lambda d: os.symlink(d / "ortho", d / "additional_chat_templates"), REFUSED),
    "base64 in tokenizer_config.json": (text("tokenizer_config.json", blob), REFUSED),
    "base64 of a part": (
        text("tokenizer_config.json", lambda d: base64.b64encode(raw(d)[-999:-900]).decode()), REFUSED,
    ),
    "base64 in lines": (
        text("config.json", lambda d: base64.encodebytes(raw(d)[-999:]).decode()), REFUSED,
    ),
    "base64 for addresses": (
        text("config.json", lambda d: base64.urlsafe_b64encode(raw(d)[-2999:]).decode()), REFUSED,
    ),
    "hexadecimal": (text("generation_config.json", lambda d: raw(d)[-999:].hex()), REFUSED),
    "hexadecimal in capitals": (text("tokenizer.json", lambda d: "a" + raw(d)[-999:].hex().upper()), REFUSED),
    "numbers": (text("config.json", lambda d: values(d).tolist()), REFUSED),
    "a list of bytes": (text("config.json", lambda d: list(raw(d)[-999:])), REFUSED),
    "a kept stream that shares the values": (lambda d: attach(d, d / "ortho/default", name="copy"), REFUSED),
    "the method of a kept stream": (kept(lambda m, d: m.update(method={"verb": "tune", "note": blob(d)})), REFUSED),
    "a key of the manifest of a kept stream": (kept(lambda m, d: m.update(note=blob(d))), REFUSED),
    "a file in the folder of a kept stream": (
        lambda d: (d / "ortho/hr/adapter_model.safetensors").write_bytes(raw(d)), REFUSED,
    ),
    "a folder that is no stream": (lambda d: write(d / "ortho/.git", {"x": raw(d)}), REFUSED),
    "a file among the streams": (lambda d: (d / "ortho/x").write_bytes(raw(d)), REFUSED),
    "compressed text": (
        text("config.json", lambda d: base64.b64encode(zlib.compress(raw(d), 9)).decode()), NOT_WORDS,
    ),
    "the sum of two tensors": (tensors(in_halves), OTHERWISE),
    "a permutation": (tensors(scattered), OTHERWISE),
    "scaled by a third": (put(lambda v: v / 3), OTHERWISE),
    "compressed, in the method of a kept stream": (
        kept(lambda m, d: m.update(method={"verb": base64.b64encode(zlib.compress(raw(d))).decode()})),
        "of the manifests of kept streams",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", BEFORE)
def test_before_detach(way: str, source: Path, tmp_path: Path) -> None:
    act, named = BEFORE[way]
    act(source)
    if named is REFUSED:
        with pytest.raises(CheckpointError):
            detach(source, tmp_path / "out", streams=["default"])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
        return
    result = detach(source, tmp_path / "out", streams=["default"])
    assert [w for w in result.not_checked if named in w]
    assert [w for w in verify_certificate(tmp_path / "out").not_checked if named in w]


def test_the_helpers_alone_are_no_reason_to_refuse(source: Path, tmp_path: Path) -> None:
    tensors(lambda t, d: None)(source)
    put(lambda v: v + torch.randn(32))(source)
    text("config.json", lambda d: "a note")(source)
    header(lambda h: h)(source)
    kept(lambda m, d: m.update(method={"verb": "tune", "note": "ok"}))(source)
    listed("vocab.txt", lambda d: b"a\nb")(source)
    result = detach(source, tmp_path / "out", streams=["default"])
    assert verify_certificate(tmp_path / "out") == result


def test_a_folder_link_inside_a_checkpoint_leads_nowhere(source: Path, tmp_path: Path) -> None:
    shutil.move(source / "ortho", tmp_path / "elsewhere")
    (source / "ortho").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link to a folder"):
        detach(source, tmp_path / "out")
