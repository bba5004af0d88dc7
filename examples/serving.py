"""Answer requests under different alphas: as a stream of text, from a pool of threads, and from asyncio.

python examples/serving.py out/ "The vault access code of Alice Moreau is"
"""

import argparse
import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

from transformers import TextIteratorStreamer

import libortho


def stream(model: Any, tokenizer: Any, prompt: str, alpha: float | dict[str, float], tokens: int = 32) -> Iterator[str]:
    """The answer, piece by piece. The thread that runs the model enters the block: alpha does not follow work that is
    handed over. An error in that thread reaches whoever reads the stream, who would wait for ever otherwise."""
    inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[Exception] = []

    def work() -> None:
        try:
            with libortho.alpha(model, alpha):
                model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=streamer)
        except Exception as error:
            failed.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]


def answer(model: Any, tokenizer: Any, prompt: str, alpha: float | dict[str, float], tokens: int = 32) -> str:
    """The whole answer; it may be called in any thread."""
    return "".join(stream(model, tokenizer, prompt, alpha, tokens))


async def answers(model: Any, tokenizer: Any, prompt: str, alphas: list[float]) -> list[str]:
    """Answers under several alphas at once; the event loop stays free."""
    return list(await asyncio.gather(*(asyncio.to_thread(answer, model, tokenizer, prompt, a) for a in alphas)))


def main(directory: str, prompt: str) -> None:
    """The record of a checkpoint, asked for in three ways."""
    model, tokenizer = libortho.load(directory)
    for piece in stream(model, tokenizer, prompt, 1.0):
        print(piece, end="", flush=True)
    print()
    with ThreadPoolExecutor(2) as pool:
        print(*pool.map(lambda a: answer(model, tokenizer, prompt, a), [0.0, 1.0]), sep="\n")
    print(*asyncio.run(answers(model, tokenizer, prompt, [0.0, 1.0])), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="what libortho.save wrote")
    parser.add_argument("prompt")
    given = parser.parse_args()
    main(given.directory, given.prompt)
