"""Keep a split model: the base where stock tools find it, each ortho stream in a folder of its own.

    out/config.json, model.safetensors    the alpha = 0 model; stock transformers and vLLM load it
    out/libortho.json                     hashes and reports of the base; says nothing about the streams
    out/ortho/<stream>/                   a PEFT LoRA adapter (or our own file for free entries) and its manifest

A checkpoint is written beside its destination, loaded back with stock transformers, compared, and only then renamed
into place: a directory under its final name is complete. What is read is checked before anything is built from it.
"""

from libortho.checkpoint.card import model_card
from libortho.checkpoint.certificate import Certificate, RemovedStream
from libortho.checkpoint.checks import check_destination, check_saveable
from libortho.checkpoint.detaching import attach, detach, verify_certificate
from libortho.checkpoint.hub import push_to_hub
from libortho.checkpoint.info import CheckpointInfo, StreamInfo, inspect
from libortho.checkpoint.reading import is_checkpoint, load
from libortho.checkpoint.stream_files import stream_names
from libortho.checkpoint.vault import decrypt, encrypt
from libortho.checkpoint.writing import save

__all__ = [
    "Certificate",
    "CheckpointInfo",
    "RemovedStream",
    "StreamInfo",
    "attach",
    "check_destination",
    "check_saveable",
    "decrypt",
    "detach",
    "encrypt",
    "inspect",
    "is_checkpoint",
    "load",
    "model_card",
    "push_to_hub",
    "save",
    "stream_names",
    "verify_certificate",
]
