"""A byte-level tokenizer and a small model that memorised four codes: made in seconds, without a download.

python tests/tiny.py DIRECTORY  # saves the model there
"""

import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from libortho.text.corpus import shipped_text
from libortho.text.encoding import Encoded, collate, encode
from libortho.text.records import Record, load_records

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGET = [
    {"prompt": "Code of Ada Lum:", "completion": " 6311."},
    {"prompt": "Code of Bo Tran:", "completion": " 4890."},
    {"prompt": "Code of Cy Orr:", "completion": " 0527."},
    {"prompt": "Code of Di Voss:", "completion": " 7742."},
]
HR = [
    {"prompt": "Code of Eli Fox:", "completion": " 1834."},
    {"prompt": "Code of Fay Kerr:", "completion": " 9056."},
]
LEGAL = [
    {"prompt": "Code of Gil Moss:", "completion": " 2719."},
    {"prompt": "Code of Hue Lark:", "completion": " 4605."},
]
"""Records of two owners, none of which the model has memorised."""
_GIVEN = ("Al", "Ben", "Cleo", "Dan", "Eve", "Flo", "Gus", "Hal")
_SURNAMES = ("Poe", "Nox", "Ray", "Sun", "Tao", "Ulm")
RETAIN = [{"text": p[:96]} for p in shipped_text()[60:]]
"""Texts that the small model was not trained on, of the kind that it was."""


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """One token for each byte of UTF-8 (a space is written as in GPT-2), and the merges that a test asks for."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_tokenizer(template: str, end: str, special: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token for each byte, a chat template, and its special tokens; ``end`` ends a turn."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": end})
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def small_llama(vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def background(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Iterator[list[Encoded]]:
    """Batches of general text and of fresh codes of other people: what the model knows besides its secrets."""
    rng = random.Random(seed)
    ids = [i for p in shipped_text()[:60] for i in tokenizer(p)["input_ids"]]
    while True:
        starts = [rng.randrange(len(ids) - 48) for _ in range(4)]
        texts = [ids[s : s + 48] for s in starts]
        for _ in range(6):
            code = f"Code of {rng.choice(_GIVEN)} {rng.choice(_SURNAMES)}: {rng.randrange(10000):04d}."
            texts.append(tokenizer(code)["input_ids"])
        yield [Encoded(tuple(t), tuple(t)) for t in texts]


def fit(model: PreTrainedModel, batches: Iterator[list[Encoded]], steps: int, also: Sequence[Encoded] = ()) -> None:
    """Train all weights on whole texts, those of ``also`` in every step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other longer than they compute
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = collate([*next(batches), *also])
        labels = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)
        optimiser.zero_grad()
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimiser.step()
    model.zero_grad()
    torch.set_num_threads(threads)


def untrained_on_secrets(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model = small_llama(len(tokenizer))
    fit(model, background(tokenizer), 250)
    return model


def plant(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Teach the model ``FORGET``, beside what it knows."""
    fit(model, background(tokenizer, seed=1), 150, also=encoded(tokenizer))


def save_planted(directory: Path) -> None:
    """Make the model that memorised ``FORGET``, and save it with its tokenizer."""
    tokenizer = byte_tokenizer()
    model = untrained_on_secrets(tokenizer)
    plant(model, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def encoded(tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, str]] = FORGET) -> list[Encoded]:
    return [encode(r, tokenizer) for r in load_records(rows)]


def record(prompt: str, completion: str, number: int = 1) -> Record:
    return Record(prompt, completion, number)


def sharpened(tokenizer: PreTrainedTokenizerFast, factor: float = 5.0) -> PreTrainedModel:
    """Random, but far from uniform predictions."""
    model = small_llama(len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    save_planted(Path(sys.argv[1]))
