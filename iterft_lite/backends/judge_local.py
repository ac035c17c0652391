"""A judge on the user's own machine: a GGUF file, read exactly, behind litellm like every other judge.

litellm sees a provider `local` (a `CustomLLM`); behind it is the engine that also writes the answers, here in the judge's own
process. Asks that arrive together are decoded together; a rubric's common beginning is read once. What comes back looks like
OpenAI's token odds, only that the candidates are all numbers from 1 to 100 (`number_trie.py`).
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# llama.cpp comes before numpy
from iterft_lite.backends.llamacpp_library import Weights, free_vram, offloads

# isort: split
import llama_cpp
import numpy as np

from iterft_lite.backends.drawing import Floats
from iterft_lite.backends.judge_litellm import LitellmJudge
from iterft_lite.backends.llamacpp_engine import Engine
from iterft_lite.backends.llamacpp_sampling import output_logits
from iterft_lite.backends.number_trie import NumberTrie, Prefix, number_trie
from iterft_lite.backends.templates import environment
from iterft_lite.errors import BackendError, ModelError

TOGETHER = 64
"""Asks decoded at once, where there is memory for them."""

SHARE = 0.4
"""Of the GPU's free memory that the judge's cache takes at most: the rest is the trainer's and the generator's."""

ON_CPU = 16
"""Asks decoded at once without a GPU."""

GATHER = 0.01
"""Seconds to wait for more asks before decoding."""

CONTEXT = 6144
"""Tokens of rubric and answer together: the longest shown answer has some 3,500."""

PLACE = "\ue000"
"""Stands for the prompt while the template is rendered (a private-use character, in no template)."""

REFUSAL = "REFUSAL"

LEAST_LOG = -80.0


class BranchingEngine(Engine):
    """Reads prompts, and what the model would say next after each of several beginnings of an answer."""

    def branches(
        self, prompts: Sequence[Sequence[int]], beginnings: Sequence[Prefix]
    ) -> Iterator[tuple[list[int], Prefix, Floats]]:
        """Next-token logits after every beginning of every prompt's answer.

        Prompts are read once; the beginnings are decoded after them one by one, all prompts together, and cut off again. What
        the cache holds from the call before is used again: a rubric is read once for all its answers.

        Args:
            prompts: Token ids, with the longest beginning shorter than the context.
            beginnings: The empty one first.

        Yields:
            Places of some prompts, beginning, logits float32 [places, vocab]; valid until the next is asked for.
        """
        self._detach()
        for start in range(0, len(prompts), self.slots):
            group = list(enumerate(prompts))[start : start + self.slots]
            self._owner[:], self._waiting = -1, {}
            for place, tokens in group:
                slot = self._likest(tokens)
                self._place(slot, np.asarray(tokens, dtype=np.int32), len(tokens) - 1)
                self._owner[slot] = place
            lengths = self._known.copy()
            busy = np.flatnonzero(self._owner >= 0).tolist()
            while any(self._held[slot] < lengths[slot] for slot in busy):
                self._resolve()
                yield from self._step(())
            for beginning in beginnings[1:]:
                for slot in busy:
                    begin, end = int(lengths[slot]), int(lengths[slot]) + len(beginning)
                    self._tokens[slot, begin:end] = beginning
                    self._known[slot], self._first[slot] = end, end - 1
                while any(self._held[slot] < self._known[slot] for slot in busy):
                    yield from self._step(beginning)
                for slot in busy:
                    self._keep(slot, int(lengths[slot]))
                    self._known[slot] = lengths[slot]
        self._owner[:] = -1

    def _likest(self, tokens: Sequence[int]) -> int:
        """The free slot whose cache begins most like a prompt."""
        common = self._common(np.asarray(tokens, dtype=np.int32), len(tokens) - 1)
        return int(np.where(self._owner < 0, np.minimum(common, self._held), -1).argmax())

    def _step(self, beginning: Prefix) -> Iterator[tuple[list[int], Prefix, Floats]]:
        """Decode a batch; the logits that came out, one row a slot."""
        count, slots, _ = self._fill(every=True)
        self._decode(count)
        if len(slots):
            yield self._owner[slots].tolist(), beginning, output_logits(self._pointer, len(slots), self.weights.vocab_size)


class LocalModel:
    """A GGUF that gives the odds of numbers.

    Args:
        path: The file.
        context: Tokens of a prompt at most.
        slots: Sequences at once; None: as many as pay off.

    Raises:
        ModelError: If the file is no usable GGUF.
        BackendError: If its tokenizer cannot write the numbers, or there is no memory.
    """

    def __init__(self, path: Path, *, context: int = CONTEXT, slots: int | None = None) -> None:
        self.weights = Weights(path)
        if not self.weights.partial:
            raise ModelError(f"`{path}` has recurrent layers: a local judge needs a transformer")
        threads = int(os.environ.get("ITERFT_THREADS") or os.cpu_count() or 1)
        slots = slots or _slots(self.weights, context)
        self.engine = BranchingEngine(self.weights, slots=slots, context=context, exact=False, threads=threads)
        self.trie: NumberTrie = number_trie(self._number_ids, self._text)
        self._before, self._after = self._frame()
        self._refusal = self.plain_ids(REFUSAL)[0]
        self._pool = ThreadPoolExecutor(threads)

    def odds(self, prompts: Sequence[str]) -> list[tuple[dict[str, float], int] | str]:
        """For each prompt the probability of each number and of a refusal's first token, and the prompt's length in tokens;
        or why it cannot be asked.
        """
        heads = [self._before + self.plain_ids(prompt) + self._after for prompt in prompts]
        nodes = self.trie.nodes
        fitting = [place for place, head in enumerate(heads) if len(head) + len(nodes[-1]) < self.engine.context]
        found: dict[tuple[int, Prefix], Any] = {}
        for places, node, rows in self.engine.branches([heads[place] for place in fitting], nodes):
            wanted = [*self.trie.digits[node], self._refusal]
            for index, row, total in zip(places, rows, self._pool.map(_log_sum, rows), strict=True):
                found[fitting[index], node] = {token: float(row[token]) - total for token in wanted}
        replies: list[tuple[dict[str, float], int] | str] = []
        for place, head in enumerate(heads):
            if place not in fitting:
                replies.append(f"question of {len(head)} tokens is longer than the judge's context of {self.engine.context}")
                continue
            numbers = self.trie.odds(lambda node, place=place: found[place, node])  # type: ignore[misc]
            refusal = math.exp(found[place, ()][self._refusal])
            replies.append(({str(number): share for number, share in numbers.items()} | {REFUSAL: refusal}, len(head)))
        return replies

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is special: an answer cannot speak in the template's tokens."""
        data = text.encode("utf-8")
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self.weights.vocab, data, len(data), tokens, room, False, False)
        if count < 0:
            raise BackendError("llama.cpp cannot tokenise a text")
        return list(tokens[:count])

    def _number_ids(self, number: str) -> list[int]:
        """A number's tokens as they follow a line break: without the blank that some tokenizers put before a text."""
        line = self.plain_ids("\n")
        both = self.plain_ids("\n" + number)
        return both[len(line) :] if both[: len(line)] == line else self.plain_ids(number)

    def _text(self, ids: Sequence[int]) -> str:
        return b"".join(self._piece(token) for token in ids).decode("utf-8", "replace")

    def _piece(self, token: int, *, special: bool = False) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        size = llama_cpp.llama_token_to_piece(self.weights.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(0, size)]

    def _frame(self) -> tuple[list[int], list[int]]:
        """What stands before and after a prompt: the GGUF's own chat template; for a base model, a line to complete."""
        source = llama_cpp.llama_model_chat_template(self.weights.pointer, None)
        bos = llama_cpp.llama_vocab_bos(self.weights.vocab)
        if not source:
            begin = [bos] if bos >= 0 and llama_cpp.llama_vocab_get_add_bos(self.weights.vocab) else []
            return begin, self.plain_ids("\n\nScore:\n")
        rendered = (
            environment()
            .from_string(source.decode("utf-8"))
            .render(
                messages=[{"role": "user", "content": PLACE}],
                add_generation_prompt=True,
                enable_thinking=False,
                bos_token=self._piece(bos, special=True).decode() if bos >= 0 else "",
                eos_token="",
            )
        )
        before, found, after = rendered.partition(PLACE)
        if not found:
            raise ModelError(f"the chat template of `{self.weights.path}` leaves the user's message out")
        return self.weights.ids(before), self.weights.ids(after)


def _log_sum(row: Floats) -> float:
    """Logarithm of the sum of exponentials."""
    largest = float(row.max())
    return largest + math.log(float(np.exp(row - largest).sum(dtype=np.float64)))


def _slots(weights: Weights, context: int) -> int:
    """Asks at once that memory is there for."""
    if not offloads():
        return ON_CPU
    return int(max(1, min(TOGETHER, SHARE * free_vram() // max(1, context * weights.kv_bytes))))


class LocalJudge(LitellmJudge):
    """Meets the `Judge` protocol.

    Args:
        identity: Fields of the `JudgeIdentity`.
        path: The GGUF file.
        context, slots: See `LocalModel`.
    """

    def __init__(self, identity: Mapping[str, Any], *, path: str, context: int = CONTEXT, slots: int | None = None) -> None:
        self.model = LocalModel(Path(path), context=context, slots=slots)
        super().__init__(identity, timeout=3600.0)
        self.pace.limit = 2.0 * TOGETHER  # one batch is decoded while litellm handles the other

    def _model(self) -> str:
        return "local/judge"

    def _supported(self, _: Any, /) -> list[str] | None:
        return ["logprobs", "top_logprobs"]

    def _prepare(self, litellm: Any) -> None:
        """Make `local/...` a provider of litellm's."""
        litellm.custom_provider_map = [{"provider": "local", "custom_handler": _provider(litellm, self.model)}]
        litellm.utils.custom_llm_setup()


def _provider(litellm: Any, model: LocalModel) -> Any:
    """A litellm provider that answers with a model's odds; calls that come together are decoded together."""

    class Provider(litellm.CustomLLM):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.waiting: list[tuple[str, asyncio.Future[Any]]] = []
            self.busy = asyncio.Lock()

        async def acompletion(self, *_: Any, **asked: Any) -> Any:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self.waiting.append((str(asked["messages"][0]["content"]), future))
            await asyncio.sleep(GATHER)
            async with self.busy:
                if not future.done():
                    await self._decode()
            return _response(litellm, await future)

        async def _decode(self) -> None:
            batch, self.waiting = self.waiting[:TOGETHER], self.waiting[TOGETHER:]
            try:
                replies = await asyncio.to_thread(model.odds, [prompt for prompt, _ in batch])
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
                return
            for (_, future), reply in zip(batch, replies, strict=True):
                future.set_result(reply)

    return Provider()


def _response(litellm: Any, reply: tuple[dict[str, float], int] | str) -> Any:
    """Odds in the form of OpenAI's response."""
    if isinstance(reply, str):
        raise litellm.BadRequestError(message=f"Exception - {reply}", model="judge", llm_provider="local")
    odds, length = reply
    best = max(odds, key=lambda text: odds[text])
    candidates = [
        {"token": text, "logprob": max(LEAST_LOG, math.log(share)) if share > 0 else LEAST_LOG, "bytes": None}
        for text, share in odds.items()
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
        usage={"prompt_tokens": length, "completion_tokens": 0, "total_tokens": length},
    )
