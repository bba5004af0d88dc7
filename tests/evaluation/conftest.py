import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tiny
from libortho.lm.model import LanguageModel


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny.sharpened(tokenizer)


@pytest.fixture
def lm(model: PreTrainedModel) -> LanguageModel:
    return LanguageModel(model)
