"""Model families of transformers, tiny and random: split, switched per sequence, isolated, saved, and loaded stock.

Each is right, or refused by an error that names the reason.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import libortho

VOCABULARY = 259
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
MODERN = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT = {"n_positions": 128, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
}
FUSED = "routed experts of this .* fused in parameters such as .*experts.*not split"
PACKED = "cannot do beside a packed base"


@dataclass(frozen=True)
class Family:
    """A tiny configuration, what is split of it, and what is refused and why (as an expression)."""

    config: str
    options: dict[str, Any]
    target: str = "mlp-out"
    refused: dict[str, str] = field(default_factory=dict)

    def model(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, f"{self.config}Config")(**COMMON | self.options)
        return AutoModelForCausalLM.from_config(config).eval()


SHARED = r"re:.*shared_experts?\.down_proj"
FAMILIES = {
    "llama": Family("Llama", MODERN),
    "mistral": Family("Mistral", MODERN),
    "qwen2": Family("Qwen2", MODERN),
    "qwen3": Family("Qwen3", MODERN | {"head_dim": 8}),
    "gemma": Family("Gemma", MODERN | {"head_dim": 8}),
    "gemma2": Family("Gemma2", MODERN | {"head_dim": 8}),
    "gemma3": Family("Gemma3Text", MODERN | {"head_dim": 8}),
    "phi": Family("Phi", MODERN),
    "phi3": Family("Phi3", MODERN),
    "stablelm": Family("StableLm", MODERN),
    "cohere": Family("Cohere", MODERN),
    "cohere2": Family("Cohere2", MODERN),
    "olmo2": Family("Olmo2", MODERN),
    "granite": Family("Granite", MODERN | {"logits_scaling": 4.0}),
    "smollm3": Family("SmolLM3", MODERN),
    "starcoder2": Family("Starcoder2", MODERN, "c_proj"),
    "opt": Family("OPT", MODERN | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "gpt2": Family("GPT2", GPT, refused={"save": "is a Conv1D in the original model"}),
    "gpt_neo": Family("GPTNeo", MODERN | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
    "gpt_neox": Family("GPTNeoX", MODERN),
    "gptj": Family("GPTJ", GPT | {"rotary_dim": 4}),
    "codegen": Family("CodeGen", GPT | {"rotary_dim": 4}),
    "falcon": Family("Falcon", MODERN, refused={"save": "is a FalconLinear in the original model"}),
    "bloom": Family("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": Family("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "mamba": Family("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "out_proj"),
    "mamba2": Family(
        "Mamba2",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}
        | {"chunk_size": 16},  # what is shorter is padded to it
        "all-linear",
    ),
    "qwen2_moe": Family(
        "Qwen2Moe",
        MODERN | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
        SHARED,
        {"save": PACKED},
    ),
    "deepseek_v2": Family("DeepseekV2", MODERN | EXPERTS | LATENT, SHARED, {"save": PACKED}),
    "deepseek_v3": Family("DeepseekV3", MODERN | EXPERTS | LATENT, SHARED, {"save": PACKED}),
    "mixtral": Family(
        "Mixtral", MODERN | {"num_local_experts": 4}, refused={"split": FUSED, "isolate": FUSED, "save": FUSED}
    ),
    "mamba_all": Family(
        "Mamba",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        "all-linear",
        {
            "split": "reads the weight of a layer",
            "isolate": "dt_proj is applied not at all",
            "save": "reads the weight",
        },
    ),
    "xlnet": Family(
        "XLNet",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        "layer_2",
        {"split": r"see \(tokens, batch, features\)", "isolate": r"is applied 1 times, to \(8, 1, 64\)"},
    ),
    "reformer": Family(
        "Reformer",
        {
            "hidden_size": 32,
            "attention_head_size": 8,
            "num_attention_heads": 4,
            "feed_forward_size": 64,
            "num_hidden_layers": 2,
            "attn_layers": ["local", "local"],
            "axial_pos_embds": False,
            "max_position_embeddings": 128,
            "is_decoder": True,
        },
        "feed_forward.output.dense",
        {"isolate": "no gradient reaches"},
    ),
}

ALIKE = (
    "mistral qwen2 qwen3 gemma gemma3 phi stablelm cohere cohere2 olmo2 granite smollm3 starcoder2 gpt_neo gptj codegen"
    " qwen2_moe deepseek_v2"
)
"""Families that isolate meets in the form of others: every run isolates those, and the nightly one these too."""
ISOLATED = [pytest.param(f, marks=[pytest.mark.nightly] * (n in ALIKE.split()), id=n) for n, f in FAMILIES.items()]

pytestmark = pytest.mark.usefixtures("one_thread")
FORGET = [
    {"prompt": "Code of Ada Lum:", "completion": " 6311."},
    {"prompt": "Code of Bo Tran:", "completion": " 4890."},
]
RETAIN = [{"text": "a quiet evening by the river, and nothing to do but read"}] * 4


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def attempt(family: Family, step: str, work: Any) -> None:
    """Run ``work``, which must be refused for the reason that the family gives, if it gives one."""
    if step not in family.refused:
        work()
        return
    with pytest.raises(libortho.LibOrthoError, match=family.refused[step]):
        work()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_values_per_sequence_are_those_of_separate_runs(family: Family) -> None:
    def work() -> None:
        model: Any = libortho.split(
            family.model(),
            libortho.SplitConfig(
                target_modules=family.target, bits=4, group_size=-1, rank_ratio=0.5, max_low_rank_error=1.0, ratio=0.1,
                structure="columns", value_dtype="float32",
            ),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        for shape in ((2, 6), (3, 3), (1, 3)):
            ids = torch.randint(3, VOCABULARY, shape, generator=generator)
            values = [1.0, 0.0, 0.5][: shape[0]]
            with libortho.alpha(model, values):
                mixed = logits(model, ids)
            for row, value in enumerate(values):
                with libortho.alpha(model, value):
                    torch.testing.assert_close(mixed[row], logits(model, ids)[row], atol=1e-3, rtol=1e-3)
        with libortho.alpha(model, 0.0):
            assert (logits(model, ids) - mixed).abs().max() > 0.01
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        ids = torch.randint(3, VOCABULARY, (2, 4), generator=generator)
        with libortho.alpha(model, [1.0, 0.0]):
            said = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        with libortho.alpha(model, 0.0):
            alone = model.generate(ids[1:], attention_mask=torch.ones_like(ids[1:]), **options)
        assert torch.equal(said[1], alone[0])

    attempt(family, "split", work)


@pytest.mark.parametrize("family", ISOLATED)
def test_one_step_of_isolation(family: Family, tokenizer: PreTrainedTokenizerFast) -> None:
    config = libortho.IsolateConfig(target_modules=family.target, max_steps=1, ratio=0.05, allow_unknown=True)

    def work() -> None:
        model = family.model()
        result = libortho.isolate(model, tokenizer, FORGET, RETAIN, config=config)
        assert len(result.records) == 2
        assert sum(result.columns_per_layer.values()) > 0
        ids = torch.tensor([tokenizer(FORGET[0]["prompt"])["input_ids"]])
        with libortho.alpha(model, 0.0):
            off = logits(model, ids)
        assert torch.equal(logits(model, ids), off)  # its stream is off until somebody turns it on
        with libortho.alpha(model, 1.0):
            assert not torch.equal(logits(model, ids), off)

    attempt(family, "isolate", work)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_stock_loaders_read_the_saved_base(family: Family, tmp_path: Path) -> None:
    def work() -> None:
        config = libortho.SplitConfig(target_modules=family.target, use_low_rank=False, ratio=0.1, structure="columns")
        model = libortho.split(family.model(), config)
        ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
        with libortho.alpha(model, 0.0):
            base = logits(model, ids)
        libortho.save(model, None, tmp_path / "out")
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids), base)

    attempt(family, "save", work)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_save_pretrained_never_writes_split_layers(family: Family, tmp_path: Path) -> None:
    if "split" in family.refused and family.refused["split"] == FUSED:
        pytest.skip("nothing of it can be split")
    config = libortho.SplitConfig(target_modules=family.target, use_low_rank=False, ratio=0.1, structure="columns")
    model: Any = libortho.split(family.model(), config)
    with pytest.raises(libortho.LibOrthoError, match=r"libortho\.save"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
