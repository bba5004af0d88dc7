"""What somebody does who knows the format: change a checkpoint, and make its hashes fit."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from making import edit, write
from safetensors.torch import load_file, save_file

from libortho.checkpoint.json_files import file_sha256
from libortho.checkpoint.manifest import BaseManifest
from libortho.checkpoint.tensor_files import TensorFiles

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
LAYER = "model.layers.0.mlp.down_proj"
WEIGHTS = "model.safetensors"
STREAM = "ortho/default/adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


def fit(d: Path) -> None:
    """Make all hashes of a checkpoint fit what its base holds."""
    base = BaseManifest.read(d)
    both = dict(zip(("base_sha256", "rest_sha256"), base.scheme.hashes(base.shapes, TensorFiles(d)), strict=True))
    listed = {f: None if h is None else file_sha256(d / f) for f, h in base.files.items()}
    edit(d / "libortho.json", lambda m: m.update(both, files=listed))
    for path in d.glob("ortho/*/manifest.json"):
        edit(path, lambda m: m.update(both))


def rewrite(path: Path, change: Callable[[Tensors], Any], metadata: dict[str, str] | None = None) -> None:
    """Change the tensors of a file, and nothing that names its hash."""
    tensors = load_file(path)
    change(tensors)
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"} if metadata is None else metadata)


def forge_base(d: Path, change: Callable[[Tensors], Any]) -> None:
    """Change tensors of the base, with hashes that fit."""
    rewrite(d / WEIGHTS, change)
    fit(d)


def forge_json(d: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a listed file such as config.json, with a hash that fits."""
    edit(d / name, change)
    fit(d)


def forge_stream(d: Path, change: Callable[[Tensors], Any]) -> None:
    """Change values of the stream "default", with a hash that fits."""
    folder = d / "ortho/default"
    path = next(folder.glob("*.safetensors"))
    rewrite(path, change)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder / "manifest.json", lambda m: m.update(weights_sha256=digest))


def set_to(name: str, place: Any, value: float) -> Callable[[Tensors], None]:
    return lambda t: t[name].__setitem__(place, value)


# -- the same as steps that a table can hold ---------------------------------------------------------------------------


def raw(d: Path) -> bytes:
    """The file of the stream "default"."""
    return (d / STREAM).read_bytes()


def blob(d: Path) -> str:
    return base64.b64encode(raw(d)).decode()


def values(d: Path) -> torch.Tensor:
    """A column of the stream "default", (32,)."""
    return load_file(d / STREAM)[f"base_model.model.{LAYER}.lora_B.weight"][:, 0]


def tensors(change: Callable[[Tensors, Path], Any]) -> Callable[[Path], None]:
    """Change tensors of the base."""
    return lambda d: forge_base(d, lambda t: change(t, d))


def put(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """A changed column of the stream as a row of the embeddings."""
    return tensors(lambda t, d: t[EMBEDDING].__setitem__(9, change(values(d)).to(t[EMBEDDING].dtype)))


def described(**metadata: str) -> Callable[[Path], None]:
    """The same tensors under other metadata."""
    return lambda d: rewrite(d / WEIGHTS, lambda t: None, metadata)


def header(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Change the text of the header of the base's weights."""

    def act(d: Path) -> None:
        content = (d / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = change(content[8 : 8 + length].decode()).encode()
        (d / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return act


def text(name: str, say: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A key of a file of the tokenizer or the model."""
    return lambda d: forge_json(d, name, lambda c: c.update(note=say(d)))


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Other text in a file, once."""

    def act(d: Path) -> None:
        content = (d / name).read_text()
        assert old in content
        (d / name).write_text(content.replace(old, new, 1))

    return act


def manifest(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], None]:
    return lambda d: edit(d / "libortho.json", lambda m: change(m, d))


def kept(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], None]:
    """Change the manifest of the other stream."""
    return lambda d: edit(d / "ortho/hr/manifest.json", lambda m: change(m, d))


def listed(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    """A file more, named by ``libortho.json``."""

    def act(d: Path) -> None:
        write(d, {name: content(d)})
        edit(d / "libortho.json", lambda m: m["files"].update({name: file_sha256(d / name)}))

    return act


def index_beside(d: Path, change: Callable[[Tensors], Any]) -> None:
    """An index and its one shard beside the weights, with other tensors."""
    shard = "model-00001-of-00001.safetensors"
    found = load_file(d / WEIGHTS)
    change(found)
    save_file(found, d / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(found, shard)}
    (d / "model.safetensors.index.json").write_text(json.dumps(index))
