"""Text and numbers as the report's page writes them; everything that a report holds is escaped here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

from libortho.auditing.page.glossary import Metric

MISSING = "\u2013"
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
"""Characters that cannot be seen, or that change the direction of others."""


def number(value: Any, digits: int = 3, signed: bool = False, tiny: bool = True) -> str:
    """A number as people read it: ``digits`` decimals, thousands apart, a true minus sign; an en dash for none.

    Whole numbers (``int``) stay whole. What is very large, or with ``tiny`` would round to zero, looks like 3.2e-5.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        text = f"{value:+,}" if signed else f"{value:,}"
    elif value != 0 and ((tiny and abs(value) < 0.5 * 10.0**-digits) or abs(value) >= 1e6):
        mantissa, exponent = f"{value:+.1e}".split("e") if signed else f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        value = round(value, digits) + 0.0  # no minus before a zero
        text = f"{value:+,.{digits}f}" if signed and value != 0 else f"{value:,.{digits}f}"
    return text.replace("-", "\u2212")


def visible(text: Any) -> Markup:
    """Escaped text; masked characters are marked, invisible or direction-changing ones written as code points."""
    safe = str(escape(str(text)))
    safe = UNSEEN.sub(lambda m: f'<span class="unseen">U+{ord(m[0]):04X}</span>', safe)
    return Markup(re.sub("\u2022+", lambda m: f'<span class="mask">{m[0]}</span>', safe))


def prose(text: Any) -> Markup:
    """Like ``visible``, for sentences: `code` set as code, proper signs, and no "Withheld:", which the page says."""
    signs = str(text).removeprefix("Withheld: ").replace("<=", "\u2264").replace(">=", "\u2265")
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(visible(signs))))


def cell(value: Any, metric: Metric) -> Markup:
    """A table cell from an Estimate or a number: the number, its interval, and for a share a thin bar."""
    estimate = value if isinstance(value, Mapping) else {"value": value, "low": None, "high": None}
    shown = number(estimate["value"], metric.digits, metric.signed)
    if estimate["value"] is None:
        return Markup(f'<span class="none">{shown}</span>')
    low, high = estimate.get("low"), estimate.get("high")
    size = f' title="n = {number(estimate["n"])}"' if estimate.get("n") is not None else ""
    parts = [f'<span class="value"{size}>{shown}</span>']
    if low is not None and high is not None:
        wide = metric.digits > 1 and high - low >= 5 * 10.0 ** (1 - metric.digits)
        digits = metric.digits - wide  # the last decimal of a wide interval says nothing
        ends = f"{number(low, digits, metric.signed, False)} to {number(high, digits, metric.signed, False)}"
        parts.append(f'<span class="interval">{ends}</span>')
    if metric.share:
        v, a, b = (
            max(0.0, min(1.0, float(x))) * 100
            for x in (estimate["value"], *((low, high) if low is not None and high is not None else (0.0, 0.0)))
        )
        parts.append(
            f'<span class="rail" aria-hidden="true"><i style="width:{v:.1f}%"></i><b '
            f'style="left:{a:.1f}%;width:{b - a:.1f}%"></b></span>'
        )
    return Markup("".join(parts))


def target(text: Any) -> Markup:
    """A check's target such as ``<= 0.05`` with proper signs, which stay with their number."""
    signs = re.sub(r"(<=|>=|<|>) ", lambda m: {"<=": "\u2264", ">=": "\u2265"}.get(m[1], m[1]) + "\u00a0", str(text))
    return visible(re.sub(r"-(?=[0-9.])", "\u2212", signs))


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{value * 100:.3g} %"


_JSON_UNSAFE = re.compile("[<>&\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def embedded_json(value: Any) -> Markup:
    """JSON that no HTML parser can leave: ``<``, ``>``, ``&`` and unseen characters as ``\\uXXXX``."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
    text = re.sub(
        r'\[[^\[\]{}"]*\]', lambda m: re.sub(r"\n *", " ", m[0]), text
    )  # lists of numbers on one line; no string holds a newline
    return Markup(_JSON_UNSAFE.sub(lambda m: f"\\u{ord(m[0]):04x}", text))
