"""Results as tables on a terminal. Names and words that come from files are shown as they are, and steer nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from libortho.core.escapes import one_line, visible

if TYPE_CHECKING:
    from libortho.auditing.report import AuditReport
    from libortho.auditing.schema import SubjectData
    from libortho.checkpoint import Certificate, CheckpointInfo
    from libortho.core.report import LayerReports
    from libortho.demo.demo import DemoReport
    from libortho.evaluation.evaluate import Evaluation, Figure
    from libortho.isolation.criteria import RecordOutcome
    from libortho.isolation.result import IsolateResult
    from libortho.tuning.result import TuneResult

_ODD_AT_MOST = 10
"""Records that are named one by one."""


class Terminal(Console):
    """A console that prints text as it is: no markup, no codes for emoji, and control characters written out."""

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments to write; only the console itself adds control sequences."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(visible(part.text), part.style)


def note(console: Console, text: str) -> None:
    """One line of plain text."""
    console.print(Text(one_line(text)))


def _cells(*texts: str) -> list[Text]:
    """Texts as one line each, before a table measures them."""
    return [Text(one_line(t)) for t in texts]


def _headers(*texts: str) -> list[Column]:
    return [Column(header=cell) for cell in _cells(*texts)]


def _block(text: str) -> Text:
    """Text that keeps its lines."""
    return Text(visible(text.strip()))


def show_table(table: Table, console: Console) -> None:
    """A table if it fits with every word whole; else a paragraph for each row, with the headers beside the values."""
    rows = list(zip(*(map(str, column.cells) for column in table.columns), strict=True))
    headers = [str(column.header) for column in table.columns]
    lines = console.render_lines(table, pad=False)
    drawn = "\n".join("".join(segment.text for segment in line) for line in lines)
    if all(word in drawn for texts in (headers, *rows) for text in texts for word in visible(text).split()):
        console.print(table)
        return
    if table.title:
        note(console, f"{table.title}:")
    for first, *others in rows:
        note(console, f"{headers[0]} {first}")
        shown = [""]
        for pair in (one_line(f"{h} {v}") for h, v in zip(headers[1:], others, strict=True)):
            together = f"{shown[-1]}, {pair}" if shown[-1] else pair
            shown[-1:] = [together] if len(together) < console.width - 2 else [shown[-1], pair]
        console.print(Padding(Text(",\n".join(filter(None, shown))), (0, 0, 0, 2)))


def _plain_table(head: Iterable[str], rows: Iterable[Iterable[str]], *, right: bool = False) -> Table:
    """A table without lines, whose first column holds names; ``right`` sets the others to the right."""
    table = Table(*_headers(*head), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right" if right else "left"
    for row in rows:
        table.add_row(*_cells(*row))
    return table


def show_split(reports: LayerReports, console: Console, *, bits: int | None, stream: str, layers: bool) -> None:
    """What a split took and lost, over all layers together; with ``layers`` a row for each before it."""
    if layers:
        head, *rows = reports.cells()
        show_table(_plain_table(head, rows, right=True), console)
    t = reports.totals()
    weights = sum(r.shape[0] * r.shape[1] for r in reports)
    width = "dense" if bits is None else f"INT{bits}"
    worst_base, worst = (max(reports, key=lambda r: getattr(r, f"{n}_error")) for n in ("base", "final"))
    note(
        console,
        f"split {len(reports)} layers, {weights / 1e6:.1f} M weights: base {width}, "
        f"{t['base_bytes'] / 1e6:.1f} MB, {8 * t['base_bytes'] / weights:.2f} bits per weight; stream {stream}, "
        f"{t['ortho_bytes'] / 1e6:.2f} MB",
    )
    note(console, f"ortho density {t['ortho_density']:.3%}, tail density {t['tail_density']:.2%}")
    for name, row, error in (("base", worst_base, worst_base.base_error), ("final", worst, worst.final_error)):
        note(console, f"{name} error: mean {t[f'{name}_error']:.2%}, worst {error:.2%} in {row.name}")


def show_isolate(result: IsolateResult, console: Console) -> None:
    """The criteria, each with its figure."""
    extracted = sum(r.extracted for r in result.records)
    inside = sum(r.inside for r in result.records)
    note(
        console,
        f"isolated {len(result.records)} records into stream {result.stream!r} in {result.steps} steps, "
        f"{result.seconds:.0f} s: density {result.density:.3%}, {len(result.columns_per_layer)} layers touched",
    )
    note(
        console,
        f"at alpha = 0: {extracted} extracted, {inside} of {len(result.records)} inside the 5-95 % band, retain KL "
        f"{result.retain_kl:.4f} nats per token",
    )
    if result.recited_on < result.recited:
        note(
            console,
            f"at alpha = 1: {result.recited_on} of the {result.recited} records that the model recited; the others "
            "fell to the rounding of the base (more bits keep them)",
        )
    for warning in result.warnings:
        note(console, f"warning: {warning}")
    show_missed(result, console)
    odd = [(r.number, words) for r in result.records if (words := _odd(r))]
    for number, words in odd[:_ODD_AT_MOST]:
        note(console, f"  record {number}: {words}")
    if len(odd) > _ODD_AT_MOST:
        note(console, f"  and {len(odd) - _ODD_AT_MOST} more; --json lists all")


def _odd(record: RecordOutcome) -> str:
    """What is odd about a record at alpha = 0; empty if nothing is."""
    found = ["still said"] if record.extracted else []
    if record.partial:
        found.append("still said in part")
    if record.nearly:
        found.append("nearly said")
    if not record.inside:
        side = "likelier" if record.after > record.band[1] else "unlikelier"
        found.append(
            f"{side} than others of its shape ({record.after:.2f} nats per token, they have {record.band[0]:.2f} to "
            f"{record.band[1]:.2f})"
        )
    return ", ".join(found)


def show_missed(result: IsolateResult | TuneResult, console: Console) -> None:
    """The criteria that do not hold, and what to do about each."""
    for missed, advice in zip(result.missed, result.advice, strict=True):
        note(console, f"missed: {missed}")
        note(console, f"  what to do: {advice}")


def show_checkpoint(info: CheckpointInfo, console: Console) -> None:
    """Sizes of the base and of each stream, and the criteria that its isolation missed."""
    width = "dense" if info.bits is None else f"INT{info.bits}"
    group = "" if info.bits is None else (", per channel" if info.group_size == -1 else f", group {info.group_size}")
    note(
        console,
        f"{info.layers} split layers, {info.weights / 1e6:.1f} M weights, base {width}{group}: "
        f"{info.base_bytes / 1e6:.1f} MB, {info.bits_per_weight:.2f} bits per weight",
    )
    rows = []
    for s in info.streams:
        rows.append((
            s.name, " + ".join(s.kinds), str(s.layers), f"{s.density:.3%}", f"{s.tail_density:.2%}",
            f"{s.bytes_on_disk / 1e6:.2f} MB", "libortho" if s.needs_libortho else "PEFT",
            "matches" if s.base_matches else "ANOTHER BASE", _criteria(s.missed),
        ))  # fmt: skip
    if not info.streams:
        note(console, "no ortho stream: this is alpha = 0")
        return
    head = ("stream", "parts", "layers", "density", "tail", "on disk", "loads with", "base", "criteria")
    show_table(_plain_table(head, rows), console)
    for s in info.streams:
        for missed in s.missed or ():
            note(console, f"stream {s.name} missed: {missed}")


def _criteria(missed: tuple[str, ...] | None) -> str:
    """How an isolation ended; a split by weights alone has no criteria."""
    return "-" if missed is None else f"{len(missed)} MISSED" if missed else "met"


def show_certificate(certificate: Certificate, console: Console) -> None:
    """What is gone, what stays, and by which hashes."""
    for r in certificate.removed:
        note(
            console,
            f"gone: stream {r.name}, density {r.density:.3%}, tail {r.tail_density:.2%}, {r.layers} layers, "
            f"{r.bytes / 1e6:.2f} MB",
        )
    note(console, f"kept: the base{''.join(f', stream {k}' for k in certificate.kept)}")
    note(console, f"base {certificate.base_sha256}")
    note(console, f"{len(certificate.files)} files hashed, {certificate.compared} tensors, rows and columns compared")
    for v in [] if certificate.audit is None else certificate.audit["verdicts"]:
        note(console, f"audit, {v['key'].replace('_', ' ')}: {v['status']}")
    for text in certificate.not_checked:
        note(console, f"not checked: {text}")


def show_verdicts(report: AuditReport, console: Console) -> None:
    """One paragraph for each verdict."""
    for verdict in report.verdicts:
        note(console, f"{verdict.status.upper():9}{verdict.key.replace('_', ' ')}: {verdict.text}")


def show_audit(report: AuditReport, console: Console) -> None:
    """Verdicts first, then the figures with the controls beside them."""
    data = report.to_dict()
    show_verdicts(report, console)
    for warning in data["warnings"]:
        note(console, f"warning: {warning}")
    console.print()
    table = Table(
        "", "extracted", "in samples", "other prompts", "prefix", "strength", "exposure", "nats", title="memory"
    )
    for s in data["subjects"]:
        m = s["memory"]
        shares = ("greedy_extraction", "sampled_extraction", "prompt_shift", "prefix_sweep")
        table.add_row(*_cells(
            s["label"], *(_estimate(m[k], "{:.1%}") for k in shares),
            _estimate(m["extraction_strength"], "{:.3f}"), _estimate(m["exposure"], "{:.1f}"),
            _estimate(m["nll"], "{:.2f}"),
        ))  # fmt: skip
    show_table(table, console)
    if data["subjects"][0]["privacy"] is not None:
        names = list(dict.fromkeys(n for s in data["subjects"] for n in s["privacy"]["attacks"]))
        headers = _headers(*(n.replace("_", "-") for n in names))
        table = Table("", *headers, title="membership AUC (95 % interval)")
        for s in data["subjects"]:
            attacks = s["privacy"]["attacks"]
            shown = (_interval(attacks[n]["auc"]) if n in attacks else "-" for n in names)
            table.add_row(*_cells(s["label"], *shown))
        show_table(table, console)
    tasks = list(dict.fromkeys(n for s in data["subjects"] for n in (s["utility"] or {}).get("tasks", {})))
    table = Table("", "perplexity", "KL", "top-1", *_headers(*tasks), title="utility")
    for s in data["subjects"]:
        u = s["utility"]
        table.add_row(*_cells(
            s["label"], _estimate(u["perplexity"], "{:.2f}"), _number(u["kl"], "{:.4f}"),
            _number(u["top1_agreement"], "{:.3f}"), *(_estimate(u["tasks"].get(t), "{:.3f}") for t in tasks),
        ))  # fmt: skip
    show_table(table, console)
    if data["curve"]:
        table = Table("alpha", "extracted", "strength", "nats", "AUC", "perplexity", "KL", title="alpha curve")
        for p in data["curve"]:
            table.add_row(
                f"{p['alpha']:g}", f"{p['greedy_extraction']:.1%}", f"{p['extraction_strength']:.3f}",
                f"{p['nll']:.2f}",
                _number(p["auc"], "{:.3f}"), f"{p['perplexity']:.2f}", _number(p["kl"], "{:.4f}"),
            )  # fmt: skip
        show_table(table, console)
        if (zone := data["goldilocks"]) is not None:
            found = ", ".join(f"{low:g} to {high:g}" for low, high in zone["intervals"]) or "none"
            note(console, f"Goldilocks interval of alpha: {found} ({zone['criteria']})")
    parts = ", ".join(f"{n} {t:.0f}" for n, t in sorted(report.seconds.items(), key=lambda item: -item[1]) if t >= 1)
    note(console, f"{sum(report.seconds.values()):.0f} s: {parts}")


def show_evaluation(report: Evaluation, console: Console) -> None:
    """A row for each task and metric, a column for each model or alpha, then what changed from the first column."""
    table = Table("task", "metric", *_headers(*report.columns), "rows")
    rows: dict[tuple[str, str], dict[str, Figure]] = {}
    for f in report.figures:
        rows.setdefault((f.task, f.metric), {})[f.column] = f
    for (task, metric), found in rows.items():
        asked = next(iter(found.values())).rows
        figures = [_figure(found.get(c)) for c in report.columns]
        table.add_row(*_cells(task, metric, *figures, "" if asked is None else str(asked)))
    show_table(table, console)
    if report.differences:
        [versus] = _headers(f"minus {report.columns[0]}, paired")
        changes = Table("task", "metric", "column", versus, "95 % interval")
        for d in report.differences:
            ends = "-" if d.low is None else f"{d.low:+.4f} to {d.high:+.4f}"
            changes.add_row(*_cells(d.task, d.metric, d.column, f"{d.value:+.4f}", ends))
        show_table(changes, console)
    marks = {
        "brackets: 95 % interval": any(f.low is not None for f in report.figures),
        "+-: standard error of the lm-evaluation-harness": any(f.stderr is not None for f in report.figures),
        "nll: nats per token": any(f.metric == "nll" for f in report.figures),
    }
    if any(marks.values()):
        note(console, "; ".join(text for text, there in marks.items() if there))


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    if figure.low is not None:
        return f"{figure.value:.4f} [{figure.low:.4f}, {figure.high:.4f}]"
    return f"{figure.value:.4f}" + ("" if figure.stderr is None else f" +- {figure.stderr:.4f}")


def _estimate(estimate: Mapping[str, Any] | None, form: str) -> str:
    return "-" if estimate is None else _number(estimate["value"], form)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _interval(estimate: Mapping[str, Any]) -> str:
    ends = "" if estimate["low"] is None else f" ({estimate['low']:.2f}-{estimate['high']:.2f})"
    return f"{estimate['value']:.3f}{ends}"


def show_demo(report: DemoReport, console: Console, *, full: bool = True) -> None:
    """The parts of the demonstration; without ``full``, what fits 80 columns."""
    note(
        console, f"{report.model}, seed {report.seed}: {report.secrets} secrets planted in {report.implant_steps} steps"
    )
    console.print()
    if full:
        _show_splits(report, console)
    else:
        [split] = report.splits
        said = f"at alpha = 0 {split.extracted[1]} of {report.secrets} secrets are still said"
        note(console, f"(a) split sees only the weights, and compresses: {said}")
    console.print()
    r = report.isolate
    note(
        console,
        f"(b) isolate sees the secrets: {r.density:.2%} of the split weights, {r.steps} steps, {r.seconds:.0f} s",
    )
    table = Table("model", "said", "in 20 samples", "membership AUC", "general ppl")
    by_key = {s["key"]: s for s in report.audit.data["subjects"]}
    table.add_row(*_cells(*_beside(by_key["reference"])))
    table.add_row(*_cells("planted", f"{report.planted}/{report.secrets}", "-", "-", "-"))
    for key in ("on", "off"):
        table.add_row(*_cells(*_beside(by_key[key])))
    show_table(table, console)
    show_missed(r, console)
    console.print()
    note(console, f"(c) the audit judges it, by {report.secrets} records:")
    show_verdicts(report.audit, console)
    console.print()
    note(console, "(d) the same prompts, greedily")
    table = Table("prompt", "alpha = 1", "alpha = 0", show_lines=True)
    for g in report.generations:
        table.add_row(_block(g.prompt), _block(g.with_ortho), _block(g.without_ortho))
    show_table(table, console)
    total = sum(report.seconds.values())
    note(console, f"{total:.0f} s: " + ", ".join(f"{k} {v:.0f}" for k, v in report.seconds.items()))


def _show_splits(report: DemoReport, console: Console) -> None:
    note(console, "(a) split sees only the weights: it compresses; at alpha = 0 what it forgets, it breaks")
    pairs = ("forget ppl 1 / 0", "retain ppl 1 / 0", "extracted 1 / 0")
    table = Table("setting", "low-rank err", "base err", "final err", "density", "tail", *pairs)
    for s in report.splits:
        table.add_row(
            s.label, "-" if s.low_rank_error is None else f"{s.low_rank_error:.2%}", f"{s.base_error:.2%}",
            f"{s.final_error:.2%}", f"{s.ortho_density:.2%}", f"{s.tail_density:.2%}", _pair(s.forget_perplexity),
            _pair(s.retain_perplexity), f"{s.extracted[0]} / {s.extracted[1]}",
        )  # fmt: skip
    show_table(table, console)


def _beside(subject: SubjectData) -> list[str]:
    """One row of the demonstration's table."""
    greedy, sampled = subject["memory"]["greedy_extraction"], subject["memory"]["sampled_extraction"]
    private, able = subject["privacy"], subject["utility"]
    return [
        subject["label"],
        *("-" if e is None else f"{round(e['value'] * e['n'])}/{e['n']}" for e in (greedy, sampled)),
        "-" if private is None else f"{private['attacks']['loss']['auc']['value']:.3f}",
        "-" if able is None else f"{able['perplexity']['value']:.2f}",
    ]


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:.4g} / {values[1]:.4g}"
