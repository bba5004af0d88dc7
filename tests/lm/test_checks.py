"""What models are taken, and under which settings of torch."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, PreTrainedModel
from typer.testing import CliRunner

import libortho
import tiny
from libortho.auditing.measures.gradients import forget_gradient, gradient_layers
from libortho.auditing.subjects import Subject, at, dense_copy
from libortho.cli import app
from libortho.core.models import plain_torch, unwrapped
from libortho.lm.checks import check_tokens
from libortho.lm.model import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")
ISOLATE = libortho.IsolateConfig(max_steps=1, ratio=0.05, allow_unknown=True)
FORGET = tiny.FORGET[:2]


def isolate(model: Any, tokenizer: Any, **options: Any) -> Any:
    return libortho.isolate(model, tokenizer, FORGET, tiny.RETAIN[:4], config=ISOLATE, **options)


def audit(model: Any, tokenizer: Any, **options: Any) -> Any:
    config = libortho.AuditConfig(samples=2, task_rows=2, general_sequences=1, alphas=(0.0, 1.0))
    return libortho.audit(model, tokenizer, FORGET, config=config, **options)


# -- settings of torch ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(setter: Callable[[Any], None], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


SETTINGS: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device": lambda: torch.device("meta"),
}


def settings() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_plain_torch_is_plain_and_gives_the_settings_back(name):
    usual = settings()
    with SETTINGS[name]():
        before = settings()
        assert before != usual
        with plain_torch():
            assert settings() == usual
        assert settings() == before
        with contextlib.suppress(ZeroDivisionError), plain_torch():
            torch.set_default_dtype(torch.float16)
            raise ZeroDivisionError
        assert settings() == before
    assert settings() == usual


@pytest.fixture(scope="module")
def plain(one_thread, _clean, tokenizer) -> PreTrainedModel:
    """What a caller without settings gets."""
    model = copy.deepcopy(_clean)
    isolate(model, tokenizer)
    return model


@pytest.mark.parametrize("name", SETTINGS)
def test_the_callers_settings_change_no_result(name, plain, clean, tokenizer, tmp_path):
    with SETTINGS[name]():
        isolate(clean, tokenizer)
        libortho.save(clean, tokenizer, tmp_path / "out")
        loaded, _ = libortho.load(tmp_path / "out")
    tensors = [*loaded.parameters(), *loaded.buffers(), *clean.parameters(), *clean.buffers()]
    assert not any(t.is_inference() or t.is_meta for t in tensors)
    expected = plain.state_dict()
    for found in (clean.state_dict(), loaded.state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_an_audit_takes_its_own_settings(clean, tokenizer):
    expected = audit(clean, tokenizer)
    for name in ("bfloat16", "inference_mode", "autocast", "device"):
        with SETTINGS[name]():
            found = audit(clean, tokenizer)
        assert found.data["subjects"] == expected.data["subjects"], name


def test_a_model_made_in_inference_mode_is_refused_by_name(tokenizer):
    with torch.inference_mode():
        model = tiny.small_llama(len(tokenizer))
    for verb in (isolate, audit):
        with pytest.raises(libortho.ConfigError, match=r"made inside torch\.inference_mode"):
            verb(model, tokenizer)


# -- kinds of models --------------------------------------------------------------------------------------------------


def lora(model: nn.Module, *targets: str) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=list(targets or ("q_proj", "down_proj")), init_lora_weights=False)
    return get_peft_model(model, config)  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", [lambda m, t: libortho.split(m), isolate], ids=["split", "isolate"])
def test_adapters_that_are_not_merged_are_refused_by_name(verb, clean, tokenizer):
    injected: Any = inject_adapter_in_model(LoraConfig(r=2, target_modules=["v_proj"]), copy.deepcopy(clean), "mine")
    wrapped = lora(clean)
    for model, name in ((wrapped, "default"), (wrapped.base_model, "default"), (injected, "mine")):
        with pytest.raises(libortho.TargetError, match=rf"adapters '{name}'.*model = model\.merge_and_unload\(\)"):
            verb(model, tokenizer)
    wrapped.merge_adapter()
    with pytest.raises(libortho.TargetError, match="merge_and_unload"):
        verb(wrapped, tokenizer)
    verb(wrapped.merge_and_unload(), tokenizer)


def test_a_language_model_inside_a_wrapper_is_the_one_with_its_adapters(clean):
    wrapped = lora(clean)
    ids = torch.arange(3, 9).unsqueeze(0)
    lm = LanguageModel(wrapped)
    hidden = lm.decoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(lm.logits(hidden), wrapped(input_ids=ids).logits)
    assert lm.model is unwrapped(wrapped) is clean


def test_an_audit_of_adapters_is_that_of_the_merged_model(clean, planted, tokenizer):
    wrapped, dense = lora(clean), copy.deepcopy(planted)
    found = audit(wrapped, tokenizer, original=lora(planted), reference=dense).data
    assert [s["key"] for s in found["subjects"]] == ["model", "original", "reference"]
    merged = audit(wrapped.merge_and_unload(), tokenizer, reference=dense).data
    one, other = (d["subjects"][0]["per_record"]["nll"] for d in (found, merged))
    assert one == pytest.approx(other, rel=1e-3)
    assert one != pytest.approx(audit(dense, tokenizer).data["subjects"][0]["per_record"]["nll"], rel=1e-2)


def test_the_gradient_of_adapters_is_that_of_the_weights_they_make(clean, tokenizer):
    wrapped = lora(clean)
    items = tiny.encoded(tokenizer)[:2]

    def gradient(model: nn.Module) -> dict[str, torch.Tensor]:
        subject = Subject("model", "model", "audited", unwrapped(model), contextlib.nullcontext)
        return forget_gradient(subject, items, gradient_layers(subject))

    found = gradient(wrapped)
    expected = gradient(wrapped.merge_and_unload())
    assert list(found) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    for name, part in expected.items():
        torch.testing.assert_close(found[name], part, atol=1e-5, rtol=1e-3)


def test_virtual_tokens_are_refused_by_name(clean, tokenizer):
    model: Any = get_peft_model(clean, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    for verb in (lambda m, t: libortho.split(m), isolate, audit):
        with pytest.raises(libortho.TargetError, match="adds virtual tokens"):
            verb(model, tokenizer)


def test_an_encoder_decoder_is_refused_by_name(tokenizer):
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1}
    model = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), d_model=32, **sizes, **heads)).eval()
    for verb in (isolate, audit):
        with pytest.raises(libortho.TargetError, match="BartForConditionalGeneration is an encoder-decoder"):
            verb(model, tokenizer)


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def larger(tokenizer):
    """A tokenizer with a token that models of these tests have no embedding for."""
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<new>"])
    return longer


def test_a_token_without_an_embedding_is_refused_with_its_record(clean, larger):
    rows = [*FORGET, {"prompt": "Code of <new>:", "completion": " 1234."}]
    message = r"record 3 holds the token '<new>' \(id 259\).*embeddings for 259 tokens"
    state = copy.deepcopy(clean.state_dict())
    with pytest.raises(libortho.DataError, match=f"forget {message}"):
        libortho.isolate(clean, larger, rows, config=ISOLATE)
    with pytest.raises(libortho.DataError, match=f"retain {message}"):
        libortho.isolate(clean, larger, FORGET, rows, config=ISOLATE)
    with pytest.raises(libortho.DataError, match=r"forget record 2 holds the token '<new>'"):
        isolate(clean, larger, alternates=[[" 1234."], [" <new>"]])
    with pytest.raises(libortho.DataError, match=f"forget {message}"):
        libortho.audit(clean, larger, rows)
    with pytest.raises(libortho.DataError, match=f"retain {message}"):
        libortho.audit(clean, larger, FORGET, retain=rows)
    wide = copy.deepcopy(clean)
    wide.resize_token_embeddings(len(larger))
    with pytest.raises(libortho.DataError, match=f"forget {message}"):
        libortho.audit(wide, larger, rows, reference=clean)
    assert all(torch.equal(t, state[n]) for n, t in clean.state_dict().items())


def test_a_token_that_no_text_holds_is_none_of_our_business(clean, larger):
    check_tokens(clean, larger, [("the text", "Code of Ada"), ("the ids", [3, 4, 258])])
    with pytest.raises(libortho.DataError, match="the ids holds the token '<new>'"):
        check_tokens(clean, larger, [("the ids", [3, 259])])


def test_generate_names_the_token(clean, larger, tmp_path):
    libortho.save(libortho.split(clean), larger, tmp_path / "out")
    outcome = CliRunner().invoke(app, ["generate", str(tmp_path / "out"), "Code of <new>:"])
    assert isinstance(outcome.exception, libortho.DataError)
    assert "the prompt holds the token '<new>'" in str(outcome.exception)


# -- stock saving -----------------------------------------------------------------------------------------------------


def refuses(model: Any, place: Path) -> bool:
    for method in (lambda: model.save_pretrained(place), lambda: model.push_to_hub("owner/name")):
        with pytest.raises(libortho.CheckpointError, match=r"libortho\.save"):
            method()
    return not place.exists()


def test_a_split_model_refuses_stock_saving_and_so_do_its_copies(split_llama, tokenizer, tmp_path):
    place = tmp_path / "stock"
    file = io.BytesIO()
    torch.save(split_llama, file)
    file.seek(0)
    copies = [
        copy.deepcopy(split_llama),
        pickle.loads(pickle.dumps(split_llama)),
        torch.load(file, weights_only=False),
        split_llama.model,
    ]
    assert all(refuses(model, place) for model in [split_llama, *copies])
    libortho.save(split_llama, None, tmp_path / "ours")
    for streams in ("all", None):
        loaded, _ = libortho.load(tmp_path / "ours", streams=streams)
        assert refuses(loaded, place)
        libortho.save(loaded, None, tmp_path / f"again {streams}")


def test_a_model_that_was_not_split_saves_as_ever(tiny_llama: PreTrainedModel, tmp_path):
    with pytest.raises(libortho.TargetError):
        libortho.split(tiny_llama, libortho.SplitConfig(target_modules="nothing"))
    tiny_llama.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_dense_copy_saves_as_ever_and_loads_the_same(split_llama, tokens, tmp_path):
    dense: Any = dense_copy(at(split_llama, 0.0))
    dense.save_pretrained(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad(), libortho.alpha(split_llama, 0.0):
        torch.testing.assert_close(stock(tokens).logits, split_llama(tokens).logits, atol=1e-4, rtol=1e-4)
    assert refuses(split_llama, tmp_path / "stock")
