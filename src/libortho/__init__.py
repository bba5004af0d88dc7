"""Put what a language model memorised behind a switch.

y = W_base x + alpha * W_ortho x: a dense low-precision base (general knowledge), a tiny high-precision ortho stream
(secrets, personal data, whatever must be removable), and a switch chosen per request.

What this package offers is imported when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from libortho.core.version import __version__ as __version__

if TYPE_CHECKING:
    from libortho.auditing.audit import audit
    from libortho.auditing.config import AuditConfig
    from libortho.auditing.report import AuditReport
    from libortho.checkpoint.detaching import attach, detach
    from libortho.checkpoint.live import add_stream, remove_stream
    from libortho.checkpoint.reading import load
    from libortho.checkpoint.vault import decrypt, encrypt
    from libortho.checkpoint.writing import save
    from libortho.core.errors import (
        AlphaContextError,
        AlphaError,
        CheckpointError,
        ConfigError,
        DataError,
        LibOrthoError,
        TargetError,
    )
    from libortho.core.layer import LayerReport, OrthoLinear, quantise_activations
    from libortho.core.report import layer_report
    from libortho.core.switch.alpha import alpha, set_alpha
    from libortho.isolation.config import IsolateConfig
    from libortho.isolation.isolate import isolate
    from libortho.isolation.result import IsolateResult
    from libortho.splitting.config import SplitConfig
    from libortho.splitting.split import replace_linear_layers, split
    from libortho.text.patterns import read_records
    from libortho.tuning.config import TuneConfig
    from libortho.tuning.result import TuneResult
    from libortho.tuning.retune import retune
    from libortho.tuning.tune import tune

_PLACES = {
    "AlphaContextError": "core.errors",
    "AlphaError": "core.errors",
    "AuditConfig": "auditing.config",
    "AuditReport": "auditing.report",
    "CheckpointError": "core.errors",
    "ConfigError": "core.errors",
    "DataError": "core.errors",
    "IsolateConfig": "isolation.config",
    "IsolateResult": "isolation.result",
    "LayerReport": "core.layer",
    "LibOrthoError": "core.errors",
    "OrthoLinear": "core.layer",
    "SplitConfig": "splitting.config",
    "TargetError": "core.errors",
    "TuneConfig": "tuning.config",
    "TuneResult": "tuning.result",
    "add_stream": "checkpoint.live",
    "alpha": "core.switch.alpha",
    "attach": "checkpoint.detaching",
    "audit": "auditing.audit",
    "decrypt": "checkpoint.vault",
    "detach": "checkpoint.detaching",
    "encrypt": "checkpoint.vault",
    "isolate": "isolation.isolate",
    "layer_report": "core.report",
    "load": "checkpoint.reading",
    "quantise_activations": "core.layer",
    "read_records": "text.patterns",
    "remove_stream": "checkpoint.live",
    "replace_linear_layers": "splitting.split",
    "retune": "tuning.retune",
    "save": "checkpoint.writing",
    "set_alpha": "core.switch.alpha",
    "split": "splitting.split",
    "tune": "tuning.tune",
}

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
    "TuneConfig",
    "TuneResult",
    "add_stream",
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
    "read_records",
    "remove_stream",
    "replace_linear_layers",
    "retune",
    "save",
    "set_alpha",
    "split",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
