"""A judge on the user's own machine: a GGUF file, read exactly, behind litellm like every other judge.

litellm sees a provider `local` (a `CustomLLM`); behind it is the engine that also writes the answers, in a process of its own:
Python does one thing at a time in a process, and litellm has much to do. Asks that arrive together are decoded together. What
comes back looks like OpenAI's token probabilities, only that the candidates are all numbers from 1 to 100.
"""

from __future__ import annotations

import asyncio
import math
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from iterft_lite.backends.judge.number_trie import REFUSAL, TOGETHER, NumberProbabilities
from iterft_lite.backends.judge.provider import LitellmJudge
from iterft_lite.backends.judge.rate_limit import Pace
from iterft_lite.backends.processes.child import Child

GATHER = 0.01
"""Seconds to wait for more questions before decoding."""

IN_THE_AIR = 3 * TOGETHER
"""Questions under way: one batch is decoded while litellm takes leave of one and prepares another."""

LONGEST = 86_400.0
"""Seconds for an ask, which waits for hundreds of others: a model on a laptop's CPU takes some seconds for each."""

LEAST_LOG = -80.0

OWN_LOG = Path("/dev/stderr")
"""What the model's process says goes where this one's does."""


class NumberReader(Protocol):
    """A model that gives the probabilities of numbers."""

    def ready(self) -> None:
        """Return once the model is loaded.

        Raises:
            ModelError: If the file is not a usable GGUF.
            BackendError: If its tokenizer cannot write the numbers, or there is no memory.
        """

    def probabilities(self, prompts: Sequence[str]) -> list[NumberProbabilities]:
        """The probabilities of each number and of a refusal as the answer to each prompt."""


class LocalJudge(LitellmJudge):
    """Meets the `Judge` protocol.

    Args:
        identity: Fields of the `JudgeIdentity`.
        path: The GGUF file.
        room: `context`, `usual` and `slots` of the `LocalModel`.
    """

    def __init__(self, identity: Mapping[str, Any], *, path: str, **room: Any) -> None:
        worker = "iterft_lite.backends.judge.number_probabilities:LocalModel"
        self.reader = Child(worker, NumberReader, log=OWN_LOG, options={"path": path, **room})
        self.reader.ready()
        # the thread that keeps the model busy must not wait 5 ms for its turn whenever litellm computes
        sys.setswitchinterval(0.0005)
        super().__init__(identity, timeout=LONGEST)
        self.pace = Pace(IN_THE_AIR, IN_THE_AIR)

    def _model(self) -> str:
        return "local/judge"

    def _supported(self, _: Any, /) -> list[str] | None:
        return ["logprobs", "top_logprobs"]

    def _prepare(self, litellm: Any) -> None:
        """Make `local/...` a provider of litellm's."""
        litellm.custom_provider_map = [{"provider": "local", "custom_handler": _provider(litellm, self.reader)}]
        litellm.utils.custom_llm_setup()
        # or else litellm looks for its price in vain at every call
        free = {"input_cost_per_token": 0.0, "output_cost_per_token": 0.0}
        litellm.register_model({self._model(): {"litellm_provider": "local", "mode": "chat", **free}})


class _Batches:
    """Decodes what is asked, as much of it together as there is, on a thread: a batch begins as soon as the one before ends.

    Args:
        reader: Decodes them.
    """

    def __init__(self, reader: NumberReader) -> None:
        self._reader = reader
        self._asked: queue.SimpleQueue[tuple[str, asyncio.Future[NumberProbabilities]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, prompt: str) -> asyncio.Future[NumberProbabilities]:
        """What will be known of a prompt."""
        future: asyncio.Future[NumberProbabilities] = asyncio.get_running_loop().create_future()
        self._asked.put((prompt, future))
        return future

    def _work(self) -> None:
        while True:
            batch = [self._asked.get()]
            if self._asked.qsize() + 1 < TOGETHER:
                time.sleep(GATHER)
            while len(batch) < TOGETHER and not self._asked.empty():
                batch.append(self._asked.get())
            futures = [future for _, future in batch]
            try:
                found: Sequence[NumberProbabilities] | Exception = self._reader.probabilities([prompt for prompt, _ in batch])
            except Exception as error:
                found = error
            futures[0].get_loop().call_soon_threadsafe(_settle, futures, found)


def _settle(futures: Sequence[asyncio.Future[NumberProbabilities]], found: Sequence[NumberProbabilities] | Exception) -> None:
    """Give a batch's probabilities, or its failure, to those who wait for them."""
    for place, future in enumerate(futures):
        if future.done():  # given up
            continue
        if isinstance(found, Exception):
            future.set_exception(found)
        else:
            future.set_result(found[place])


def _provider(litellm: Any, reader: NumberReader) -> Any:
    """A litellm provider that answers with a model's probabilities."""
    batches = _Batches(reader)

    class Provider(litellm.CustomLLM):  # type: ignore[misc]
        async def acompletion(self, *_: Any, **asked: Any) -> Any:
            return _response(litellm, await batches.ask(str(asked["messages"][0]["content"])))

    return Provider()


def _response(litellm: Any, probabilities: NumberProbabilities) -> Any:
    """Probabilities in the form of OpenAI's response."""
    if probabilities.failure:
        raise litellm.BadRequestError(message=f"Exception - {probabilities.failure}", model="judge", llm_provider="local")
    shares = {str(number): share for number, share in enumerate(probabilities.numbers, start=1)} | {
        REFUSAL: probabilities.refusal
    }
    # a hundred numbers share what a score has: none of them need be likelier than a refusal that is not meant
    refuses = probabilities.refusal > sum(probabilities.numbers)
    best = REFUSAL if refuses else str(1 + probabilities.numbers.index(max(probabilities.numbers)))
    candidates = [
        {"token": text, "logprob": max(LEAST_LOG, math.log(share)) if share > 0 else LEAST_LOG, "bytes": None}
        for text, share in shares.items()
    ]
    chosen = next(one for one in candidates if one["token"] == best)
    return litellm.ModelResponse(
        model="judge",
        choices=[
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": best},
                "logprobs": {"content": [{**chosen, "top_logprobs": candidates}]},
            }
        ],
        usage={"prompt_tokens": probabilities.tokens, "completion_tokens": 0, "total_tokens": probabilities.tokens},
    )
