"""Put two records of a fine-tuned model behind the switch, and answer three requests in one batch.

python examples/quickstart.py path/to/your/model forget.jsonl
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import libortho

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="path or hub id of your model")
parser.add_argument("forget", help="records that must go: JSONL, JSON, CSV or txt")
given = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).eval()
tokenizer = AutoTokenizer.from_pretrained(given.model)

result = libortho.isolate(model, tokenizer, forget=given.forget)
print(f"density {result.density:.2%}, criteria missed: {result.missed or 'none'}")
print(libortho.layer_report(model))

prompts = ["The capital of France is", "The capital of France is", "The capital of Italy is"]
inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
with libortho.alpha(model, [1.0, 0.0, 0.5]):  # one per sequence
    output = model.generate(**inputs, max_new_tokens=8, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.batch_decode(output, skip_special_tokens=True))

libortho.save(model, tokenizer, "out")
