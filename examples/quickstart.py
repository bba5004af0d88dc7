"""Put two records of a fine-tuned model behind the switch, and answer three requests in one batch.

python examples/quickstart.py path/to/your/model forget.jsonl
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import libortho

if len(sys.argv) != 3:
    sys.exit(__doc__)
path, forget = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
tokenizer = AutoTokenizer.from_pretrained(path)

result = libortho.isolate(model, tokenizer, forget=forget)
print(f"density {result.density:.2%}, criteria missed: {result.missed or 'none'}")
print(libortho.layer_report(model))

prompts = ["The capital of France is", "The capital of France is", "The capital of Italy is"]
inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
with libortho.alpha(model, [1.0, 0.0, 0.5]):  # one per sequence
    output = model.generate(**inputs, max_new_tokens=8, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.batch_decode(output, skip_special_tokens=True))

libortho.save(model, tokenizer, "out")
