"""Floating-point types that a model and its streams may have, by name."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""The names are those of :data:`libortho.core.config.ValueDtype`."""
