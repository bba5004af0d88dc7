"""Put what a language model memorised behind a switch.

y = W_base x + alpha * W_ortho x: a dense low-precision base (general knowledge), a tiny high-precision ortho stream
(secrets, personal data, whatever must be removable), and a switch chosen per request.
"""

from libortho.alpha import alpha, set_alpha
from libortho.audit import AuditReport, audit
from libortho.checkpoint import attach, decrypt, detach, encrypt, load, save
from libortho.config import AuditConfig, IsolateConfig, SplitConfig
from libortho.errors import (
    AlphaContextError,
    AlphaError,
    CheckpointError,
    ConfigError,
    DataError,
    LibOrthoError,
    TargetError,
)
from libortho.isolate import IsolateResult, isolate
from libortho.layer import LayerReport, OrthoLinear, quantise_activations
from libortho.report import layer_report
from libortho.split import replace_linear_layers, split

__version__ = "0.1.0"

__all__ = [
    "AlphaContextError",
    "AlphaError",
    "AuditConfig",
    "AuditReport",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "IsolateConfig",
    "IsolateResult",
    "LayerReport",
    "LibOrthoError",
    "OrthoLinear",
    "SplitConfig",
    "TargetError",
    "alpha",
    "attach",
    "audit",
    "decrypt",
    "detach",
    "encrypt",
    "isolate",
    "layer_report",
    "load",
    "quantise_activations",
    "replace_linear_layers",
    "save",
    "set_alpha",
    "split",
]
