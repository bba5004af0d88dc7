import json

import pytest

import libortho
from libortho import AuditConfig, ConfigError, IsolateConfig, SplitConfig
from libortho.core.config import check_stream_name


@pytest.mark.parametrize(
    ("fields", "size"),
    [({}, -1), ({"bits": 4}, 32), ({"bits": 4, "group_size": -1}, -1), ({"bits": 8, "group_size": 64}, 64)],
)
def test_group_size_resolves(fields, size):
    assert SplitConfig(**fields).resolved_group_size == size


def test_a_list_of_targets_is_copied():
    names = ["down_proj"]
    config = SplitConfig(target_modules=names)
    names.append("up_proj")
    assert config.target_modules == ("down_proj",)


def test_only_isolate_has_criteria_that_a_budget_could_be_chosen_by():
    assert IsolateConfig(ratio="auto").ratio == "auto"
    with pytest.raises(ConfigError, match="ratio is 'auto'; expected a number"):
        SplitConfig(ratio="auto")


def test_to_dict_is_json():
    config = SplitConfig(target_modules=["a", "b"], rank_ratio="auto", bits=None)
    back = json.loads(json.dumps(config.to_dict()))
    assert SplitConfig(**back) == config


BAD = [
    ("ratio", 0), ("ratio", -0.1), ("ratio", 1.1), ("ratio", float("nan")), ("ratio", True), ("ratio", "0.1"),
    ("bits", 3), ("bits", 16), ("bits", "8"), ("bits", True),
    ("group_size", 0), ("group_size", -2), ("group_size", 33), ("group_size", 32.0), ("group_size", True),
    ("value_dtype", "int8"), ("value_dtype", None),
    ("stream", ""), ("stream", "a.b"), ("stream", "../up"), ("stream", "x" * 65), ("stream", "-x"), ("stream", 1),
    ("stream", "values"), ("stream", "training"), ("stream", "a\n"),
    ("target_modules", []), ("target_modules", ""), ("target_modules", None), ("target_modules", 3),
    ("target_modules", [1]), ("target_modules", ("down_proj", None)), ("target_modules", {"down_proj"}),
]  # fmt: skip
BAD_SPLIT = [
    ("rank_ratio", 0), ("rank_ratio", 1.5), ("rank_ratio", "most"), ("rank_ratio", None), ("rank_ratio", True),
    ("max_low_rank_error", 0), ("max_low_rank_error", -1), ("error_budget", 0), ("error_budget", 2),
    ("score", "fisher"), ("structure", "rows"), ("use_low_rank", 1), ("keep_tail", "no"),
]  # fmt: skip
BAD_ISOLATE = [
    ("max_steps", 0), ("max_steps", 1.5), ("max_steps", True), ("damping", 0), ("damping", float("inf")),
    ("damping", "1"), ("gradient_checkpointing", "yes"), ("allow_unknown", None),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD + BAD_SPLIT)
def test_split_config_names_the_bad_field(field, value):
    with pytest.raises(libortho.ConfigError, match="stream name" if field == "stream" else field):
        SplitConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), BAD + BAD_ISOLATE)
def test_isolate_config_names_the_bad_field(field, value):
    with pytest.raises(libortho.ConfigError, match="stream name" if field == "stream" else field):
        IsolateConfig(**{field: value})


@pytest.mark.parametrize("name", ["hr", "tenant-7", "2024_q1", "x" * 64])
def test_stream_names(name):
    assert check_stream_name(name) == name


def test_errors_can_be_caught_as_value_errors_and_as_ours():
    with pytest.raises(ValueError, match="ratio") as caught:
        SplitConfig(ratio=2)
    assert isinstance(caught.value, libortho.LibOrthoError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("profile", "slow"),
        ("samples", 0),
        ("fillings", -1),
        ("alphas", (0.0, float("nan"))),
        ("alphas", (3.0,)),
        ("min_k", 0.0),
        ("reveal", 1),
    ],
)
def test_audit_refuses_what_it_cannot_use(field, value):
    with pytest.raises(ConfigError, match=field):
        AuditConfig(**{field: value})


def test_audit_sizes_follow_the_profile_unless_given():
    quick, full, own = AuditConfig(), AuditConfig(profile="full"), AuditConfig(profile="full", fillings=7)
    assert quick.resolved("fillings") < full.resolved("fillings")
    assert own.resolved("fillings") == 7
    assert own.to_dict()["task_rows"] == full.resolved("task_rows")
