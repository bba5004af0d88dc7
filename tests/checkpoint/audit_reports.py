"""A report of an audit with a secret in every place that could hold one."""

from typing import Any


def audit_report(**changes: Any) -> dict[str, Any]:
    """A report of the form that ``libortho audit`` writes, with a secret in every place that could hold one."""
    interval = {"value": 0.25, "low": 0.1, "high": 0.4, "n": 4}
    off = {
        "key": "off", "label": "alpha = 0",
        "memory": dict.fromkeys(("greedy_extraction", "sampled_extraction", "nll"), interval),
        "privacy": {"attacks": {"loss": {"auc": interval, "roc": [[0, 0]]}}},
        "utility": {"perplexity": interval, "kl": 0.01},
    }  # fmt: skip
    check = {"name": "extracted greedily", "value": 0.25, "target": "<= 0.01", "ok": False}
    return {
        "schema": "libortho-audit/1", "libortho": "0.1.0", "profile": "quick", "seed": 3,
        "model": {"name": "SECRET", "split": True, "streams": ["default", "hr"], "layers": 2, "bits": 8,
                  "density": 0.05},
        "counts": {"forget": 4}, "warnings": ["SECRET"], "records": [{"completion": "SECRET"}],
        "verdicts": [{"key": "memory", "status": "fail", "text": "SECRET", "checks": [check]}], "subjects": [off],
        "generations": [{"texts": {"on": "SECRET"}}], **changes,
    }  # fmt: skip
