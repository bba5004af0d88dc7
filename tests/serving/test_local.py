"""The engine in this process: rows that wait, that go away, and passes that fail."""

import asyncio
import copy
from contextlib import aclosing

import pytest

from libortho import ConfigError, remove_stream
from libortho.serving.engine import BusyError, EngineError, Row, Sampling
from libortho.serving.local import LocalEngine
from libortho.serving.prompts import Prompts
from libortho.serving.self_test import self_test

pytestmark = pytest.mark.usefixtures("one_thread")
OFF = {"hr": 0.0, "legal": 0.0}


def engine(model, tokenizer, rows=2, waiting=4):
    return LocalEngine(model, tokenizer, most_rows=rows, most_waiting=waiting)


def row(tokenizer, tokens=8, alpha=None, prompt="Code of Eli Fox:"):
    return Row(tuple(tokenizer(prompt)["input_ids"]), alpha or OFF, Sampling(max_tokens=tokens, temperature=0.0))


async def text(pieces):
    return "".join([p.text async for p in pieces])


def test_rows_wait_for_a_place_and_more_are_refused(two_streams, tokenizer):
    async def main():
        found = engine(two_streams, tokenizer)
        await found.start()
        answers = found.generate([row(tokenizer, 3 + i) for i in range(4)])
        with pytest.raises(BusyError, match="wait already"):
            found.generate([row(tokenizer)] * 3)
        texts = await asyncio.gather(*map(text, answers))
        assert all(texts[-1].startswith(t) for t in texts)
        assert found.load() == (0, 0)
        await found.close()
        with pytest.raises(EngineError, match="does not run"):
            found.generate([row(tokenizer)])

    asyncio.run(main())


def test_a_row_whose_reader_goes_away_gives_its_place_back(two_streams, tokenizer):
    async def main():
        found = engine(two_streams, tokenizer, rows=1)
        await found.start()
        first, second = found.generate([row(tokenizer, 60, prompt="Once"), row(tokenizer, 2)])
        async with aclosing(first) as pieces:
            async for _ in pieces:
                break
        assert await asyncio.wait_for(text(second), 20)
        assert found.load() == (0, 0)
        await found.close()

    asyncio.run(main())


def test_a_pass_that_fails_loses_its_rows_and_nothing_else(two_streams, tokenizer, monkeypatch):
    async def main():
        found = engine(two_streams, tokenizer)
        await found.start()
        expected = await text(found.generate([row(tokenizer)])[0])
        calls = []

        def broken(*args, **kwargs):
            calls.append(1)
            raise RuntimeError("lo-secret 1834")

        with monkeypatch.context() as patch:
            patch.setattr(type(two_streams.model), "forward", broken)
            with pytest.raises(EngineError, match="could not answer") as caught:
                await text(found.generate([row(tokenizer)])[0])
            assert "1834" not in str(caught.value)
        assert calls
        assert await text(found.generate([row(tokenizer)])[0]) == expected
        await found.close()

    asyncio.run(main())


def test_rows_that_were_granted_other_streams_than_there_are_now_are_refused(two_streams, tokenizer):
    async def main():
        found = engine(copy.deepcopy(two_streams), tokenizer, rows=1)
        await found.start()
        on = row(tokenizer, alpha={"hr": 1.0, "legal": 0.0})
        running, stale, off = found.generate([row(tokenizer, 30, prompt="Once"), on, row(tokenizer)])
        await anext(running)
        changing = asyncio.create_task(found.change(lambda model: remove_stream(model, "legal")))
        await text(running)
        await changing
        with pytest.raises(EngineError, match="have changed"):
            await asyncio.wait_for(text(stale), 20)
        assert await asyncio.wait_for(text(off), 20)  # it asked for none of them
        with pytest.raises(EngineError, match="have changed"):
            found.generate([on])
        assert await text(found.generate([row(tokenizer, alpha={"hr": 0.0})])[0])
        await found.close()

    asyncio.run(main())


@pytest.mark.parametrize(("error", "kind"), [(ConfigError("no"), ConfigError), (RuntimeError("1834"), EngineError)])
def test_a_change_that_fails_half_way_leaves_the_streams_that_there_are(two_streams, tokenizer, error, kind):
    def work(model):
        remove_stream(model, "legal")
        raise error

    async def main():
        found = engine(copy.deepcopy(two_streams), tokenizer)
        await found.start()
        with pytest.raises(kind) as caught:
            await asyncio.wait_for(found.change(work), 20)
        assert "1834" not in str(caught.value)
        assert list(found.streams) == ["hr"]
        assert await text(found.generate([row(tokenizer, alpha={"hr": 0.0})])[0])
        await found.close()

    asyncio.run(main())


def test_closing_lets_answers_end_and_refuses_those_that_wait(two_streams, tokenizer):
    async def main():
        found = engine(two_streams, tokenizer, rows=1)
        await found.start()
        first, second = found.generate([row(tokenizer, 20), row(tokenizer)])
        begun = await anext(first)
        closing = asyncio.create_task(found.close())
        rest = await text(first)
        assert begun.text + rest
        with pytest.raises(EngineError, match="going down"):
            await text(second)
        await closing

    asyncio.run(main())


class Leaking(LocalEngine):
    """Gives all rows of a call the alpha of the second."""

    def generate(self, rows):
        return super().generate([Row(r.prompt, rows[min(1, len(rows) - 1)].alpha, r.sampling) for r in rows])


class Remembering(LocalEngine):
    """Once a stream was on, it stays on."""

    def generate(self, rows):
        for r in rows:
            self.on = {n: max(a, getattr(self, "on", OFF)[n]) for n, a in r.alpha.items()}
        return super().generate([Row(r.prompt, self.on, r.sampling) for r in rows])


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [(LocalEngine, None), (Leaking, "beside"), (Remembering, "after")],
    ids=["sound", "batch", "cache"],
)
def test_an_engine_that_lets_alphas_touch_is_not_used(two_streams, tokenizer, kind, wrong):
    async def main():
        found = kind(two_streams, tokenizer, most_rows=4, most_waiting=8)
        await found.start()
        try:
            await self_test(found, Prompts(tokenizer, len(tokenizer)))
        finally:
            await found.close()

    if wrong is None:
        asyncio.run(main())
    else:
        with pytest.raises(EngineError, match=wrong):
            asyncio.run(main())
