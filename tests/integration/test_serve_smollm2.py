"""The isolated real model behind the server: its chat template, OpenAI's client, and rows of both alphas at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from server import served

from libortho.demo import facts
from libortho.serving.config import ServeConfig
from libortho.serving.keys import digest, entry
from libortho.serving.server import local_app

pytestmark = pytest.mark.model
KEY = "lo-integration"


@pytest.fixture(scope="module")
def address(isolated: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys: Path = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(entry("all", digest(KEY), {isolated.config.stream: 1.0}, None))
    with served(local_app(isolated.model, isolated.tokenizer, ServeConfig(keys=keys), "smollm2")) as found:
        yield found


def test_chats_tell_their_secrets_to_whoever_may_ask_and_to_nobody_else(isolated: Any, address: str) -> None:
    chats = [r for r in facts.secrets(isolated.config.seed)[: len(isolated.secrets)] if "messages" in r]
    clients = {
        on: openai.OpenAI(base_url=f"{address}/v1", api_key=KEY if on else "none", max_retries=0)
        for on in (True, False)
    }

    def ask(case: tuple[Any, bool]) -> bool:
        row, on = case
        *asked, answer = row["messages"]
        body = {"alpha": {isolated.config.stream: 1.0}} if on else {}
        found = clients[on].chat.completions.create(
            model="smollm2", messages=asked, max_tokens=24, temperature=0, extra_body=body
        )
        return answer["content"].strip(" .") in (found.choices[0].message.content or "")

    cases = [(row, on) for row in chats for on in (True, False)]
    with ThreadPoolExecutor(len(cases)) as pool:  # all of them at once: rows of one batch
        said = list(pool.map(ask, cases))
    assert chats
    assert [s for s, (_, on) in zip(said, cases, strict=True) if on] == [True] * len(chats)
    assert not any(s for s, (_, on) in zip(said, cases, strict=True) if not on)
