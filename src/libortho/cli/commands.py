"""The commands by name, in the order of the help text."""

from __future__ import annotations

import typer

from libortho.auditing.config import AuditConfig
from libortho.cli import checkpoints, kernels, measuring, models, records, serving, tuning
from libortho.cli.terminal import Command, Commands
from libortho.isolation.config import IsolateConfig
from libortho.splitting.config import SplitConfig
from libortho.tuning.config import TuneConfig

app = typer.Typer(
    help="Put what a language model memorised behind a switch.", no_args_is_help=True, pretty_exceptions_enable=False,
    cls=Commands, rich_markup_mode=None, context_settings={"max_content_width": 120},
)  # fmt: skip
_CONFIGS = {
    models.split: SplitConfig, models.isolate: IsolateConfig, tuning.tune: TuneConfig, tuning.retune: TuneConfig,
    measuring.audit: AuditConfig,
}  # fmt: skip
for verb in (
    models.demo, records.records, models.split, models.isolate, tuning.tune, tuning.retune, measuring.audit,
    measuring.evaluate, models.generate, serving.serve, serving.serve_key, checkpoints.inspect, checkpoints.detach,
    checkpoints.verify, checkpoints.attach, checkpoints.encrypt, checkpoints.decrypt, kernels.kernels, checkpoints.card,
):  # fmt: skip
    app.command(
        "eval" if verb is measuring.evaluate else verb.__name__.replace("_", "-"),
        cls=Command,
        context_settings={"obj": _CONFIGS.get(verb)},
    )(verb)
