"""Pictures of stored figures as SVG, light and dark. No number in them is typed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from .audits import at
from .readme import chosen
from .tables import Row, is_earlier, number, read, share

STYLE = """
    .page { fill: #fff } .ink { fill: #1f2430 } .soft { fill: #5b6475 } .line { stroke: #5b6475; fill: none }
    .interval { stroke: #1f2430; stroke-width: 1.5 }
    .original { fill: #c2602f } .off { fill: #4a72b0 } .reference { fill: #8a93a3 }
    @media (prefers-color-scheme: dark) {
      .page { fill: #161a23 } .ink { fill: #e8ebf2 } .soft { fill: #a3adbf } .line { stroke: #a3adbf }
      .interval { stroke: #fff }
      .original { fill: #c2602f } .off { fill: #4f7fc9 } .reference { fill: #6b7586 }
    }
  """
MODELS = {"original": "planted", "off": "alpha 0", "reference": "never trained"}
PANELS = (
    ("secrets said", ("memory", "greedy_extraction"), share, 1.0, None),
    ("membership AUC", ("privacy", "attacks", "loss", "auc"), number, 1.0, 0.5),
    ("WikiText perplexity", ("utility", "perplexity"), lambda v: number(v, ".1f"), None, None),
)
"""Heading, place in an audit's subject, how a value is written, end of the axis (or the largest), and a rule."""
LEFT, WIDE, GAP, HIGH = 108, 76, 56, 26
"""Of the first bar: its left end, its longest width, room for the value behind it, and height of a row."""


def drawing(width: float, height: float, title: str, description: str, style: str, parts: Sequence[str]) -> str:
    """A picture with its names for those who do not see it, on a ground of its own."""
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-labelledby="t d" font-family="system-ui, sans-serif" font-size="13">\n'
        "  <!-- Written by `python -m benchmarks.report`; do not edit. -->\n"
        f'  <title id="t">{escape(title)}</title>\n  <desc id="d">{escape(description)}</desc>\n'
        f"  <style>{style}</style>\n"
        f'  <rect class="page" width="{width:g}" height="{height:g}" rx="8"/>\n  {body}\n</svg>\n'
    )


def text(x: float, y: float, words: str, kind: str = "ink", more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}"{more}>{escape(words)}</text>'


def panel(left: float, found: dict[str, Row | None], heading: str, form, end: float, rule: float | None) -> list[str]:  # type: ignore[no-untyped-def]
    """One figure of all models: bars, their 95 % intervals where there are any, and values."""
    scale, parts = WIDE / end, [text(left, 24, heading, "soft")]
    bottom = 36 + HIGH * len(found)
    if rule is not None:
        parts.append(f'<path class="line" stroke-dasharray="2 3" d="M{left + rule * scale:.1f} 34V{bottom}"/>')
    for i, (key, value) in enumerate(found.items()):
        top = 38 + HIGH * i
        if value is None:
            parts.append(text(left, top + 14, "not measured", "soft"))
            continue
        reach = value["value"]
        parts.append(f'<rect class="{key}" x="{left:g}" y="{top}" width="{max(reach * scale, 1.5):.1f}" height="18"/>')
        if None not in (value.get("low"), value.get("high")) and value["low"] < value["high"]:
            ends = [left + value[k] * scale for k in ("low", "high")]
            parts.append(f'<path class="interval" d="M{ends[0]:.1f} {top + 9}H{ends[1]:.1f}"/>')
            reach = max(reach, value["high"])
        parts.append(text(round(left + reach * scale + 6, 1), top + 14, form(value["value"])))
    return [*parts, f'<path class="line" d="M{left:g} 34V{bottom}"/>']


def result(results: Path) -> str | None:
    """Planted, alpha 0 and never trained of the audit that README shows; None if no present one is stored."""
    report = chosen(results)
    if report is None or is_earlier(report):
        return None
    models = {s["key"]: s for s in report["subjects"]}
    parts = [text(16, 52 + HIGH * i, label) for i, label in enumerate(MODELS.values())]
    said = []
    for i, (heading, keys, form, end, rule) in enumerate(PANELS):
        found = {key: at(models.get(key), *keys) for key in MODELS}
        largest = max((v.get("high") or v["value"] for v in found.values() if v), default=1.0)
        parts += panel(LEFT + i * (WIDE + GAP), found, heading, form, end or largest or 1.0, rule)
        told = ", ".join(f"{label} {form(v['value'])}" for k, label in MODELS.items() if (v := found[k]))
        said.append(f"{heading}: {told}.")
    of = f"{report['counts']['forget']} records, profile {report['profile']}, seed {report['seed']}, {report['commit']}"
    lines = "Lines are 95 % intervals; an AUC of 0.5 is a coin's."
    below = 46 + HIGH * len(MODELS)
    for i, line in enumerate((f"Audit of {of}.", lines)):
        parts.append(text(16, below + 14 * (i + 1), line, "soft", ' font-size="11"'))
    title = "What the model says of its secrets, before and after"
    return drawing(LEFT + 3 * (WIDE + GAP), below + 40, title, " ".join([*said, lines]), STYLE, parts)


SCREEN = """
    .page { fill: #f6f7f9 } .ink { fill: #1f2430 } .soft { fill: #5b6475 } .line { stroke: #c6ccd6 }
    @media (prefers-color-scheme: dark) {
      .page { fill: #161a23 } .ink { fill: #e8ebf2 } .soft { fill: #a3adbf } .line { stroke: #3a4252 }
    }
    .screen { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre }
  """
CELL, LINE = 7.8, 16
"""Width and height of a character of the terminal."""


def terminal(results: Path) -> str | None:
    """What a command printed, as it stood in the terminal; None if nothing is stored."""
    data = read(results, "terminal")
    if not data:
        return None
    lines = data["output"].rstrip("\n").split("\n")
    parts = [text(20, 26, f"$ {data['command']}", "soft screen"), '<path class="line" d="M0 40H2000"/>']
    for i, line in enumerate(lines):
        if line.strip():
            begin = len(line) - len(line.lstrip())
            kept = f' textLength="{CELL * len(line.strip()):.1f}" lengthAdjust="spacingAndGlyphs"'
            parts.append(text(round(20 + CELL * begin, 1), 62 + LINE * i, line.strip(), "ink screen", kept))
    made = f"commit {data['commit']}, {data['date']}, {data['machine']['processor']}"
    return drawing(
        40 + CELL * data["columns"],
        76 + LINE * len(lines),
        f"Terminal: {data['command']}",
        f"What the command prints, line by line. {made}.",
        SCREEN,
        parts,
    )


PICTURES = {"result": result, "terminal": terminal}
