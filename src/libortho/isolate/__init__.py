"""Put listed records behind the switch: find where they sit, move them out, check that they are gone."""

from libortho.isolate.isolate import IsolateResult, RecordOutcome, isolate

__all__ = ["IsolateResult", "RecordOutcome", "isolate"]
