"""LoRAs of random values, as if they had been trained."""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from test_tune import logits

MLP = ["gate_proj", "up_proj", "down_proj"]


def lora(model, seed=0, **settings):
    """The model with a LoRA of random values, as if it had been trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": MLP, **settings})).eval()
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    return wrapped


def moved(model, other):
    """Largest difference of logits, relative to their spread."""
    return float((logits(model) - other).abs().max() / other.std())
