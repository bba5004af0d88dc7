"""--set: text is read by the type of the field, and the config refuses what it cannot use."""

from dataclasses import fields

import pytest

from libortho import AuditConfig, ConfigError, IsolateConfig, SplitConfig
from libortho.cli.settings import configured, from_text

TEXTS = [
    (bool, "TRUE", True), (bool, "1", "1"), (int, "12", 12), (int, "1.5", "1.5"), (float, "1e-3", 0.001),
    (float | None, "none", None), (float | None, "null", None), (int | None, "7", 7), (str, "none", "none"),
    (tuple[float, ...], "0, 0.5,1", (0.0, 0.5, 1.0)), (tuple[float, ...], "0,x", (0.0, "x")),
    (str | tuple[str, ...], "re:a{1,2}", "re:a{1,2}"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "value"), TEXTS)
def test_text_is_read_by_its_type(kind, text, value):
    found = from_text(kind, text)
    assert (type(found), found) == (type(value), value)


def test_literals_and_unions_of_the_configs():
    config = configured(SplitConfig, ["rank_ratio=auto", "value_dtype=float32"], bits="4", ratio="0.1", stream=None)
    assert config == SplitConfig(rank_ratio="auto", value_dtype="float32", bits=4, ratio=0.1)
    assert configured(IsolateConfig, ["damping=1"], bits="none", ratio="auto").bits is None
    assert configured(AuditConfig, ["alphas=0,1"]).alphas == (0.0, 1.0)
    assert configured(AuditConfig, [], profile="full").alphas == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert configured(AuditConfig, []).alphas == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("config", [SplitConfig, IsolateConfig, AuditConfig])
def test_every_field_refuses_what_it_is_not(config):
    for field in fields(config):
        if field.name == "target_modules":  # any text is a name of modules
            continue
        with pytest.raises(ConfigError, match="stream name" if field.name == "stream" else field.name):
            configured(config, [f"{field.name}=@"])


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [("hope=1", "expected NAME=VALUE with one of target_modules"), ("seed", "expected NAME=VALUE"),
     ("bits=4", "bits has an option of its own"), ("=1", "expected NAME=VALUE")],
)  # fmt: skip
def test_an_unknown_name_lists_the_fields(setting, complaint):
    with pytest.raises(ConfigError) as caught:
        configured(SplitConfig, [setting], bits="8")
    assert complaint in str(caught.value)
    assert "rank_ratio" in str(caught.value)
