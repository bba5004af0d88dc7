"""What a model carries from one forward pass to the next keeps its alpha, whatever it is called."""

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    StaticCache,
    XLNetConfig,
    XLNetLMHeadModel,
)

import libortho
from libortho.core.errors import AlphaContextError, AlphaError

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
SPLIT = libortho.SplitConfig(
    bits=4, rank_ratio=0.5, max_low_rank_error=1.0, ratio=0.2, structure="columns", value_dtype="float32"
)


def mamba() -> nn.Module:
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, initializer_range=0.2, pad_token_id=0)
    return split(MambaForCausalLM(config), "out_proj")


def rwkv() -> nn.Module:
    config = RwkvConfig(
        vocab_size=128, hidden_size=32, attention_hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        context_length=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return split(RwkvForCausalLM(config), "re:.*feed_forward.key")


def xlnet() -> nn.Module:
    config = XLNetConfig(vocab_size=128, d_model=32, n_layer=2, n_head=4, d_inner=64, mem_len=8, initializer_range=0.3)
    return split(XLNetLMHeadModel(config), "re:.*ff.layer_2")


def recurrent_gemma() -> nn.Module:
    config = RecurrentGemmaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, lru_width=32,
        attention_window_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return split(RecurrentGemmaForCausalLM(config), "down_proj")


def split(model: nn.Module, targets: str) -> nn.Module:
    torch.manual_seed(0)
    return libortho.split(model.eval(), dataclasses.replace(SPLIT, target_modules=targets))


@torch.no_grad()
def run(model: Any, tokens: torch.Tensor, value: Any, **inputs: Any) -> Any:
    with libortho.alpha(model, value):
        return model(tokens, **inputs)


def cache_name(model: nn.Module) -> str:
    """What this release calls the cache of a model."""
    names = inspect.signature(model.forward).parameters
    return next(n for n in ("cache", "past_key_values") if n in names)


CARRYING = {
    "mamba": (mamba, {"use_cache": True}, ("cache", "cache_params")),
    "rwkv": (rwkv, {"use_cache": True}, ("state",)),
    "xlnet": (xlnet, {"use_mems": True}, ("mems",)),
}


@pytest.mark.parametrize("family", list(CARRYING))
@pytest.mark.parametrize("return_dict", [True, False])
def test_a_state_of_any_name_is_continued_under_its_alpha_only(tokens, family, return_dict):
    make, options, names = CARRYING[family]
    model = make()
    first = run(model, tokens[:, :4], 1.0, **options)
    off = run(model, tokens[:, :4], 0.0, **options)
    assert not torch.allclose(first.logits, off.logits)
    name = next(n for n in names if first.get(n) is not None)
    carried = first[name]
    if not return_dict:
        output = run(model, tokens[:, :4], 1.0, return_dict=False, **options)
        carried = output[1]
        assert type(carried) is type(first[name])
    with pytest.raises(AlphaContextError, match="one request, one alpha"):
        run(model, tokens[:, 4:5], 0.0, **{name: carried}, **options)
    assert run(model, tokens[:, 4:5], 1.0, **{name: carried}, **options).logits.shape[0] == 3


def test_a_state_whose_tensors_were_copied_is_not_known(tokens):
    model = rwkv()
    state = run(model, tokens[:, :4], 1.0, use_cache=True).state
    with pytest.raises(AlphaContextError, match="alpha is unknown"):
        run(model, tokens[:, 4:5], 0.0, state=[s.clone() for s in state])
    assert run(model, tokens[:, 4:5], 1.0, state=copy.deepcopy(state)).logits.shape[0] == 3


def test_a_family_that_keeps_its_state_in_the_model_has_one_alpha_at_a_time(tokens):
    model = recurrent_gemma()
    name = cache_name(model)
    caches = {value: DynamicCache(config=model.config) for value in (1.0, 0.0)}
    for value, cache in caches.items():
        run(model, tokens[:, :4], value, use_cache=True, **{name: cache})
        run(model, tokens[:, 4:5], value, use_cache=True, **{name: cache})
    with pytest.raises(AlphaContextError, match="keeps its recurrent state in the model"):
        run(model, tokens[:, 5:6], 1.0, use_cache=True, **{name: caches[1.0]})


def test_families_with_the_tokens_first_take_one_alpha(tokens):
    model, square = xlnet(), tokens[:, :3]
    body = model.transformer
    for call in (model, body, model.forward, lambda x: type(model).forward(model, x)):
        with torch.no_grad(), libortho.alpha(model, [1.0, 0.0, 1.0]), pytest.raises(AlphaError, match="one value for"):
            call(square)
    with torch.no_grad(), libortho.alpha(model, 0.5):
        body(square)


def test_a_cache_from_tuples_is_known(split_llama, tokens):
    output = run(split_llama, tokens[:, :4], 1.0, use_cache=True, return_dict=False)
    cache = next(o for o in output if isinstance(o, DynamicCache))
    name = cache_name(split_llama)
    with pytest.raises(AlphaContextError, match="one request, one alpha"):
        run(split_llama, tokens[:, 4:], 0.0, **{name: cache})
    run(split_llama, tokens[:, 4:], 1.0, **{name: cache})


# -- rows -------------------------------------------------------------------------------------------------------------

REORDERED: dict[str, Callable[[Any], Any]] = {
    "reorder_cache": lambda c: c.reorder_cache(torch.tensor([1, 0, 2])),
    "batch_select_indices": lambda c: c.batch_select_indices(torch.tensor([1, 0, 2])),
    "by hand": lambda c: [_index(x, [1, 0, 2]) for x in c.layers],
}


def _index(layer: Any, rows: list[int]) -> None:
    layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def caches(model: Any) -> list[Any]:
    return [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)]


@pytest.mark.parametrize("kind", [0, 1], ids=["dynamic", "static"])
@pytest.mark.parametrize("change", list(REORDERED))
@pytest.mark.parametrize("equal", [True, False], ids=["equal prompts", "other prompts"])
def test_the_stamp_follows_rows(split_llama, tokens, kind, change, equal):
    if kind == 1 and change == "batch_select_indices":
        pytest.skip("static caches of transformers cannot select rows")
    prompts = tokens[:1].repeat(3, 1) if equal else tokens
    name, cache = cache_name(split_llama), caches(split_llama)[kind]
    run(split_llama, prompts[:, :4], [1.0, 0.0, 0.5], **{name: cache})
    REORDERED[change](cache)
    with pytest.raises(AlphaContextError, match="one request, one alpha"):
        run(split_llama, prompts[:, 4:], [1.0, 0.0, 0.5], **{name: copy.deepcopy(cache)})
    moved = prompts[[1, 0, 2]]
    found = run(split_llama, moved[:, 4:], [0.0, 1.0, 0.5], **{name: cache}).logits
    expected = run(split_llama, moved, [0.0, 1.0, 0.5]).logits[:, 4:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_selected_and_repeated_rows_keep_their_alphas(split_llama, tokens):
    name = cache_name(split_llama)
    cache = DynamicCache()
    run(split_llama, tokens[:, :4], [1.0, 0.0, 0.5], **{name: cache})
    cache.batch_select_indices(torch.tensor([1, 2]))
    again = pickle.loads(pickle.dumps(cache))
    for wrong in ([1.0, 0.0], [0.5, 0.0], 0.0):
        with pytest.raises(AlphaContextError):
            run(split_llama, tokens[1:, 4:], wrong, **{name: copy.deepcopy(again)})
    found = run(split_llama, tokens[1:, 4:5], [0.0, 0.5], **{name: again}).logits
    torch.testing.assert_close(found, run(split_llama, tokens[1:, :5], [0.0, 0.5]).logits[:, 4:], atol=1e-4, rtol=1e-4)
    again.batch_repeat_interleave(2)
    pairs = tokens[1:].repeat_interleave(2, 0)
    run(split_llama, pairs[:, 5:], [0.0, 0.0, 0.5, 0.5], **{name: copy.deepcopy(again)})
    with pytest.raises(AlphaContextError):
        run(split_llama, pairs[:, 5:], [0.0, 0.5, 0.0, 0.5], **{name: again})


def test_a_cropped_cache_keeps_its_rows(split_llama, tokens):
    name, cache = cache_name(split_llama), DynamicCache()
    run(split_llama, tokens, [1.0, 0.0, 0.5], **{name: cache})
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    with pytest.raises(AlphaContextError):
        run(split_llama, tokens[:, 3:], [1.0, 0.0, 0.5], **{name: copy.deepcopy(cache)})
    run(split_llama, tokens[[2, 1, 0], 3:], [0.5, 0.0, 1.0], **{name: cache})


def test_rows_that_were_written_over_are_not_known(split_llama, tokens):
    name, cache = cache_name(split_llama), DynamicCache()
    run(split_llama, tokens[:, :4], [1.0, 0.0, 0.5], **{name: cache})
    cache.layers[-1].keys[0] += 1
    with pytest.raises(AlphaContextError, match="rows of the KV cache were changed"):
        run(split_llama, tokens[:, 4:], [1.0, 0.0, 0.5], **{name: cache})


# -- interrupted, emptied, grown --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1], ids=["dynamic", "static"])
@pytest.mark.parametrize("value", [1.0, [1.0, 0.0, 0.5]])
def test_a_cache_of_an_interrupted_pass_keeps_its_alpha(split_llama, tokens, kind, value):
    name, cache = cache_name(split_llama), caches(split_llama)[kind]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = split_llama.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(split_llama, tokens[:, :4], value, **{name: cache})
    hook.remove()
    with pytest.raises(AlphaContextError):
        run(split_llama, tokens[:, 4:], 0.0, **{name: cache})
    cache.reset()
    torch.testing.assert_close(
        run(split_llama, tokens, 0.0, **{name: cache}).logits, run(split_llama, tokens, 0.0).logits
    )


def test_an_interrupted_recurrent_state_keeps_its_alpha_until_it_is_reset(tokens):
    model = mamba()
    cache = run(model, tokens[:, :4], 0.0, use_cache=True)
    name = next(n for n in ("cache", "cache_params") if n in cache)
    cache = cache[name]
    cache.reset()
    layers = model.backbone.layers

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokens[:, :4], 1.0, use_cache=True, **{name: cache})
    hook.remove()
    with pytest.raises(AlphaContextError):
        run(model, tokens[:, :4], 0.0, use_cache=True, **{name: cache})
    cache.reset()
    run(model, tokens[:, :4], 0.0, use_cache=True, **{name: cache})


def test_a_cache_that_grew_outside_the_model_is_not_known(split_llama, tokens):
    name, cache = cache_name(split_llama), DynamicCache()
    run(split_llama, tokens[:, :4], 0.0, **{name: cache})
    keys = torch.randn_like(cache.layers[0].keys[:, :, :1])
    cache.update(keys, keys, 0)
    with pytest.raises(AlphaContextError, match="grown outside the model"):
        run(split_llama, tokens[:, 4:], 0.0, **{name: cache})


def test_a_layer_alone_continues_a_cache_under_its_alpha_only(split_llama, tokens):
    name, cache = cache_name(split_llama), StaticCache(config=split_llama.config, max_cache_len=16)
    run(split_llama, tokens[:, :4], 0.0, **{name: cache})
    layer = split_llama.model.layers[0]
    inner = next(n for n in ("cache", "past_key_values") if n in inspect.signature(layer.forward).parameters)
    hidden = torch.randn(3, 1, 64)
    positions = torch.full((3, 1), 4)
    rotary = split_llama.model.rotary_emb(hidden, positions)
    with torch.no_grad(), libortho.alpha(split_llama, 1.0), pytest.raises(AlphaContextError):
        layer(hidden, position_embeddings=rotary, position_ids=positions, **{inner: cache})


def test_layers_of_another_cache_are_not_taken_for_its_own(split_llama, tokens):
    name = cache_name(split_llama)
    off, on = DynamicCache(), DynamicCache()
    run(split_llama, tokens[:, :4], 0.0, **{name: off})
    run(split_llama, tokens[:, :4], 1.0, **{name: on})
    off.layers[1] = on.layers[1]
    with pytest.raises(AlphaContextError, match="holds layers of another"):
        run(split_llama, tokens[:, 4:], 0.0, **{name: off})


def test_a_cache_for_encoder_and_decoder_is_looked_into(split_llama, tokens):
    name = cache_name(split_llama)
    halves = DynamicCache(), DynamicCache()
    run(split_llama, tokens[:, :4], 1.0, **{name: halves[0]})
    pair = EncoderDecoderCache(*halves)
    with pytest.raises(AlphaContextError):
        run(split_llama, tokens[:, 4:], 0.0, **{name: pair})


def test_states_of_an_encoder_keep_their_alpha():
    config = BartConfig(
        vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, init_std=0.3, pad_token_id=0, max_position_embeddings=32,
    )  # fmt: skip
    model: Any = split(BartForConditionalGeneration(config), "fc2")
    ids = torch.randint(3, 128, (2, 5))
    with torch.no_grad(), libortho.alpha(model, 1.0):
        encoded = model.get_encoder()(ids)
        whole = model(ids, decoder_input_ids=ids)
    for states in (encoded, (whole.encoder_last_hidden_state,)):
        with pytest.raises(AlphaContextError, match="one request, one alpha"):
            run(model, None, 0.0, encoder_outputs=states, decoder_input_ids=ids)
        again = run(model, None, 1.0, encoder_outputs=states, decoder_input_ids=ids)
        torch.testing.assert_close(again.logits, whole.logits)
    with torch.no_grad(), libortho.alpha(model, 0.0):
        assert model.generate(ids, max_new_tokens=3).shape[0] == 2


def test_recurrent_states_take_a_value_per_sequence(tokens):
    model, values = mamba(), [1.0, 0.0, 0.5]
    output = run(model, tokens[:, :4], values, use_cache=True)
    name = next(n for n in ("cache", "cache_params") if n in output)
    found = run(model, tokens[:, 4:5], values, use_cache=True, **{name: output[name]}).logits
    for row, value in enumerate(values):
        alone = run(model, tokens[row : row + 1, :5], value, use_cache=False).logits[0, 4]
        torch.testing.assert_close(found[row, 0], alone, atol=1e-3, rtol=1e-3)


def test_compiled_models_look_at_stamps(split_llama, tokens):
    torch._dynamo.reset()
    name = cache_name(split_llama)
    compiled = torch.compile(split_llama, backend="eager")
    cache = run(split_llama, tokens[:, :4], 1.0, use_cache=True)[name]
    with torch.no_grad(), libortho.alpha(split_llama, 0.0), pytest.raises(AlphaContextError):
        compiled(tokens[:, 4:], **{name: cache})
    with torch.no_grad(), libortho.alpha(split_llama, 0.5):
        made = compiled(tokens[:, :4], use_cache=True)[name]
    with pytest.raises(AlphaContextError, match="one request, one alpha"):
        run(split_llama, tokens[:, 4:], 0.0, **{name: made})
    for value in (0.0, 1.0):
        with torch.no_grad(), libortho.alpha(split_llama, value):
            torch.testing.assert_close(compiled(tokens).logits, split_llama(tokens).logits)
    torch._dynamo.reset()


def test_a_sliced_state_keeps_its_alpha(tokens):
    model = xlnet()
    mems = run(model, tokens[:, :4], 1.0, use_mems=True).mems
    sliced = [m[:-1] for m in mems]
    with pytest.raises(AlphaContextError, match="one request, one alpha"):
        run(model, tokens[:, 4:5], 0.0, use_mems=True, mems=sliced)
    run(model, tokens[:, 4:5], 1.0, use_mems=True, mems=sliced)


# -- past the top model -----------------------------------------------------------------------------------------------


def test_caches_of_the_body_are_stamped(split_llama, tokens):
    output = run(split_llama, tokens[:, :1], 1.0)  # warm
    name = cache_name(split_llama)
    with torch.no_grad(), libortho.alpha(split_llama, 1.0):
        output = split_llama.model(tokens[:, :4], use_cache=True)
    cache = output[name]
    for call in (split_llama, split_llama.model):
        with torch.no_grad(), libortho.alpha(split_llama, 0.0), pytest.raises(AlphaContextError):
            call(tokens[:, 4:], **{name: cache})
    run(split_llama, tokens[:, 4:], 1.0, **{name: cache})


def test_the_body_takes_a_value_per_sequence(split_llama, tokens):
    with torch.no_grad(), libortho.alpha(split_llama, [1.0, 0.0, 0.5]):
        mixed = split_llama.model(tokens).last_hidden_state
        with pytest.raises(AlphaError, match="names 3 sequences"):
            split_llama.model(tokens[:2])
    with torch.no_grad(), libortho.alpha(split_llama, 0.0):
        torch.testing.assert_close(mixed[1], split_llama.model(tokens[1:2]).last_hidden_state[0], atol=1e-4, rtol=1e-4)


def test_a_second_head_over_one_body(split_llama, tokens):
    head = LlamaForSequenceClassification(split_llama.config).eval()
    head.model = split_llama.model
    libortho.set_alpha(head, 0.0)
    off = run(split_llama, tokens, 0.0).logits
    with torch.no_grad():
        assert torch.equal(split_llama(tokens).logits, off)
        scores = {v: run(head, tokens, v).logits for v in (0.0, 1.0)}
        assert torch.equal(head(tokens).logits, scores[0.0])
    assert not torch.allclose(scores[0.0], scores[1.0])
