"""Train private records into a stream with TRL's SFTTrainer, and save the model with the stream switched off.

python examples/trl_stream.py MODEL records.jsonl --stream hr --out out/
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import libortho


def main(given: argparse.Namespace) -> None:
    """Choose columns, train them, put them behind the switch, and save."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from libortho.integrations.peft import column_lora, from_peft

    rows = [json.loads(line) for line in Path(given.records).read_text("utf-8").splitlines() if line.strip()]
    model: Any = AutoModelForCausalLM.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    adapted = column_lora(model, tokenizer, rows, libortho.TuneConfig(ratio=given.ratio))
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_steps=given.steps, learning_rate=given.lr, per_device_train_batch_size=8,
            bf16=False, save_strategy="no", report_to=[],
        )  # fmt: skip
        SFTTrainer(adapted, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    model = from_peft(adapted, adapted, given.stream)
    libortho.save(model.eval().cpu(), tokenizer, given.out)
    print(f"{given.out}: alpha = 0 is the model as it was, alpha = 1 of {given.stream} holds {len(rows)} records")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a causal language model")
    parser.add_argument("records", help="JSONL with a prompt and a completion in each line")
    parser.add_argument("--stream", required=True, help="name of the stream, such as hr")
    parser.add_argument("--out", required=True, help="where the checkpoint goes")
    parser.add_argument("--ratio", type=float, default=0.005, help="share of the weights that the stream may take")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    try:
        main(arguments)
    except (libortho.LibOrthoError, ImportError) as error:
        parser.error(f"{error}; TRL comes with: pip install trl" if isinstance(error, ImportError) else str(error))
