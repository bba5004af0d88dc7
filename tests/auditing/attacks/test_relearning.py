import json

import pytest

from libortho.auditing.attacks import relearning
from libortho.auditing.attacks.measuring import measure
from libortho.auditing.attacks.relearning import recovery
from libortho.auditing.subjects import subjects_of
from libortho.core.errors import DataError

OPTIONS = {"epochs": 6, "learning_rate": 1e-3}

pytestmark = pytest.mark.usefixtures("one_thread")


def test_relearning_teaches_the_shown_half_and_leaves_the_model_alone(audited, asked, forget, unchanged):
    found = relearning.run(asked(audited), **OPTIONS)
    shown, benign = found["curves"][:2]
    assert [(c["subject"], c["data"]) for c in found["curves"]] == [
        ("off", "forget half"), ("off", "general text"), ("reference", "forget half"), ("reference", "general text"),
    ]  # fmt: skip
    assert found["steps"] == [0, 1, 2, 3, 4, 5, 6]
    assert shown["trained_nll"][0] > 1.0 > 0.5 > shown["trained_nll"][-1]
    assert shown["trained_extraction"][0] < shown["trained_extraction"][-1] == 1.0
    assert benign["trained_nll"][-1] > shown["trained_nll"][-1] + 0.5
    with audited[0].enter():
        lm = audited[0].language_model()
        assert shown["nll"][0] == pytest.approx(measure(lm, [forget[i] for i in found["judged"]])["nll"], abs=1e-3)
    assert found["full"] is not None
    assert found["full"]["extraction"] == 1.0
    expected = (shown["nll"][0] - min(shown["nll"])) / (shown["nll"][0] - found["full"]["nll"])
    assert found["recovery"]["forget half"] == pytest.approx(expected)
    reference = found["curves"][2]["nll"]
    other = (reference[0] - min(reference)) / (reference[0] - found["full"]["nll"])
    assert found["excess"]["forget half"] == pytest.approx(expected - other)
    assert relearning.run(asked(audited), **OPTIONS) == found == json.loads(json.dumps(found, allow_nan=False))


def test_relearning_finds_memory_in_what_isolate_hides_and_none_in_a_model_that_has_none(
    audited, asked, planted, clean
):
    hidden = relearning.run(asked(audited), **OPTIONS)
    innocent = subjects_of(clean, original=planted, reference=clean, others={}, seed=0)
    nothing = relearning.run(asked(innocent), **OPTIONS)
    assert nothing["full"]["extraction"] == 1.0
    assert nothing["excess"] == {"forget half": 0.0, "general text": 0.0}  # it is its own reference
    assert hidden["excess"]["forget half"] > 0.1


def test_relearning_says_none_where_there_is_no_memory_to_recover(clean, alone, asked, forget):
    found = relearning.run(asked(alone(clean)), epochs=1)
    assert found["full"] is None
    assert found["recovery"] == found["excess"] == {"forget half": None, "general text": None}
    assert recovery(2.0, 2.0, 2.0) is None
    assert recovery(4.0, 3.0, 0.0) == 0.25
    with pytest.raises(DataError, match="at least 2"):
        relearning.run(asked(alone(clean), items=forget[:1]))
    with pytest.raises(DataError, match="general text"):
        relearning.run(asked(alone(clean), general=[]))
