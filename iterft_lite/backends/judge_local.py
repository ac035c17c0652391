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
from functools import partial
from pathlib import Path
from typing import Any

# llama.cpp comes before numpy
from iterft_lite.backends.llamacpp_library import Weights, free_vram, offloads

# isort: split
import llama_cpp
import numpy as np

from iterft_lite.backends.drawing import Floats, Ints
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
"""Tokens of rubric and answer together at most: the longest shown answer has some 3,500."""

USUAL_CONTEXT = 2048
"""Room for most of them. The cache has so much for every ask, and is made larger when a longer one comes."""

ALIKE = 64
"""Tokens at its beginning that tell a rubric from others; and so little is not worth copying."""

BUFFER = 2**24
"""Bytes of the GPU's free memory for each token that is read at once: a fiftieth or so of them is used."""

PLACE = "\ue000"
"""Stands for the prompt while the template is rendered (a private-use character, in no template)."""

REFUSAL = "REFUSAL"

LEAST_LOG = -80.0


class BranchingEngine(Engine):
    """Reads prompts, and what the model would say next after each of several beginnings of an answer."""

    worth_sharing = ALIKE

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
            Places of some prompts, beginning, logits float32 [places, vocab], which may be written to; valid until the next is
            asked for.
        """
        self._detach()
        # of one rubric side by side, and of nearly one length
        order = sorted(range(len(prompts)), key=lambda place: (list(prompts[place][:ALIKE]), len(prompts[place])))
        for start in range(0, len(order), self.slots):
            self._owner[:], self._waiting = -1, {}
            for place in order[start : start + self.slots]:
                slot = self._seat(prompts[place])
                self._place(slot, np.asarray(prompts[place], dtype=np.int32), len(prompts[place]) - 1)
                self._owner[slot] = place
            lengths = self._known.copy()
            busy = np.flatnonzero(self._owner >= 0)
            while (self._held[busy] < lengths[busy]).any():
                self._resolve()
                count, slots = self._fill_even()
                yield from self._outcome(count, slots, ())
                for slot in busy.tolist():
                    self._keep(slot, min(int(self._held[slot]), int(lengths[slot])))
            for beginning in beginnings[1:]:
                for slot in busy.tolist():
                    begin, end = int(lengths[slot]), int(lengths[slot]) + len(beginning)
                    self._tokens[slot, begin:end] = beginning
                    self._known[slot], self._first[slot] = end, end - 1
                while (self._held[busy] < self._known[busy]).any():
                    count, slots, _ = self._fill(every=True)
                    yield from self._outcome(count, slots, beginning)
                for slot in busy.tolist():
                    self._keep(slot, int(lengths[slot]))
                    self._known[slot] = lengths[slot]
        self._owner[:] = -1

    def _seat(self, tokens: Sequence[int]) -> int:
        """The first free slot whose cache begins like a prompt, nearly as far as any does."""
        common = self._common(np.asarray(tokens, dtype=np.int32), len(tokens) - 1)
        shared = np.where(self._owner < 0, np.minimum(common, self._held), -1)
        return int(np.flatnonzero((shared >= shared.max() - ALIKE) & (self._owner < 0))[0])

    def _fill_even(self) -> tuple[int, Ints]:
        """Write the next batch of prompts: neighbours, each filled up to the length of the longest.

        llama.cpp computes sequences of one length in one pass and takes a pass for every difference. What stands behind a
        prompt changes nothing in it; `held` counts it until it is cut off.

        Returns:
            Its tokens, and the slots whose prompts end in it.
        """
        pending = np.where(self._owner >= 0, self._known - self._held, 0)
        pending[list(self._waiting)] = 0
        first = int(np.flatnonzero(pending)[0])
        end, size = first, 0
        while end < self.slots and pending[end] and (end - first + 1) * max(size, pending[end]) <= self._batch_size:
            size, end = max(size, int(pending[end])), end + 1
        end = max(end, first + 1)
        slots = np.arange(first, end, dtype=np.int32)
        size = int(min(size or self._batch_size, self._batch_size // len(slots), (self.context - self._held[slots]).min()))
        places = self._held[slots][:, None] + np.arange(size)
        batch, count = self._batch, size * len(slots)
        batch.tokens[:count] = self._tokens[slots[:, None], places].reshape(-1)
        batch.positions[:count] = places.reshape(-1)
        batch.slots[:count] = slots.repeat(size)
        last = places == self._known[slots][:, None] - 1
        batch.wanted[:count] = last.reshape(-1)
        self._held[slots] += size
        return count, slots[last.any(axis=1)]

    def _outcome(self, count: int, slots: Ints, beginning: Prefix) -> Iterator[tuple[list[int], Prefix, Floats]]:
        """Decode the batch; the logits that came out, one row a slot."""
        self._decode(count)
        if len(slots):
            yield self._owner[slots].tolist(), beginning, output_logits(self._pointer, len(slots), self.weights.vocab_size)

    def _parameters(self, slots: int, exact: bool, gpu: bool) -> Any:
        made = super()._parameters(slots, exact, gpu)
        if gpu:
            made.n_batch = made.n_ubatch = max(512, min(4096, free_vram() // BUFFER // 512 * 512))
        return made


class LocalModel:
    """A GGUF that gives the odds of numbers.

    Args:
        path: The file.
        context: Tokens of a prompt at most.
        usual: Tokens that there is room for before a longer prompt comes.
        slots: Sequences at once; None: as many as pay off.

    Raises:
        ModelError: If the file is no usable GGUF.
        BackendError: If its tokenizer cannot write the numbers, or there is no memory.
    """

    def __init__(self, path: Path, *, context: int = CONTEXT, usual: int = USUAL_CONTEXT, slots: int | None = None) -> None:
        self.weights = Weights(path)
        if not self.weights.partial:
            raise ModelError(f"`{path}` has recurrent layers: a local judge needs a transformer")
        self._threads = int(os.environ.get("ITERFT_THREADS") or os.cpu_count() or 1)
        self._slots = slots
        self.context = min(context, self.weights.trained_context or context)
        self._engine = self._open(min(usual, self.context))
        self.trie: NumberTrie = number_trie(self._number_ids, self._text)
        self._before, self._after = self._frame()
        self._refusal = self.plain_ids(REFUSAL)[0]
        self._pool = ThreadPoolExecutor(self._threads)

    def _open(self, context: int) -> BranchingEngine:
        slots = self._slots or _slots(self.weights, context)
        return BranchingEngine(self.weights, slots=slots, context=context, exact=False, threads=self._threads)

    def _engine_for(self, length: int) -> BranchingEngine:
        """An engine with room for sequences of a length."""
        while length > self._engine.context < self.context:
            wider = min(2 * self._engine.context, self.context)
            self._engine.close()  # before the next one looks what memory is free
            self._engine = self._open(wider)
        return self._engine

    def tokens(self, prompt: str) -> list[int]:
        """What the model reads of a prompt. May be called from any thread."""
        return self._before + self.plain_ids(prompt) + self._after

    def odds(self, heads: Sequence[Sequence[int]]) -> list[dict[str, float] | str]:
        """For each of `tokens` the probability of each number and of a refusal's first token; or why it cannot be asked."""
        nodes = self.trie.nodes
        room = self.context - len(nodes[-1])
        fitting = [place for place, head in enumerate(heads) if len(head) < room]
        engine = self._engine_for(max((len(heads[place]) for place in fitting), default=0) + len(nodes[-1]) + 1)
        found: dict[tuple[int, Prefix], dict[int, float]] = {}
        for places, node, rows in engine.branches([heads[place] for place in fitting], nodes):
            read = partial(_log_odds, [*self.trie.digits[node], self._refusal])
            for place, log_odds in zip(places, self._pool.map(read, rows), strict=True):
                found[fitting[place], node] = log_odds
        replies: list[dict[str, float] | str] = []
        for place, head in enumerate(heads):
            if place not in fitting:
                replies.append(f"question of {len(head)} tokens is longer than the judge's context of {self.context}")
                continue
            numbers = self.trie.odds(lambda node, place=place: found[place, node])  # type: ignore[misc]
            refusal = math.exp(found[place, ()][self._refusal])
            replies.append({str(number): share for number, share in numbers.items()} | {REFUSAL: refusal})
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


def _log_odds(wanted: Sequence[int], row: Floats) -> dict[int, float]:
    """Natural log-probabilities of some tokens; their logits are overwritten."""
    row -= row.max()
    found = row[wanted].astype(np.float64)
    np.exp(row, out=row)
    return dict(zip(wanted, (found - math.log(row.sum(dtype=np.float64))).tolist(), strict=True))


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
        room: `context`, `usual` and `slots` of the `LocalModel`.
    """

    def __init__(self, identity: Mapping[str, Any], *, path: str, **room: Any) -> None:
        self.model = LocalModel(Path(path), **room)
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
            self.waiting: list[tuple[list[int], asyncio.Future[Any]]] = []
            self.busy = asyncio.Lock()

        async def acompletion(self, *_: Any, **asked: Any) -> Any:
            tokens = await asyncio.to_thread(model.tokens, str(asked["messages"][0]["content"]))
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self.waiting.append((tokens, future))
            await asyncio.sleep(GATHER)
            async with self.busy:
                if not future.done():
                    await self._decode()
            return _response(litellm, await future, len(tokens))

        async def _decode(self) -> None:
            batch, self.waiting = self.waiting[:TOGETHER], self.waiting[TOGETHER:]
            try:
                replies = await asyncio.to_thread(model.odds, [tokens for tokens, _ in batch])
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
                return
            for (_, future), reply in zip(batch, replies, strict=True):
                future.set_result(reply)

    return Provider()


def _response(litellm: Any, odds: dict[str, float] | str, length: int) -> Any:
    """Odds in the form of OpenAI's response, on a question of so many tokens."""
    if isinstance(odds, str):
        raise litellm.BadRequestError(message=f"Exception - {odds}", model="judge", llm_provider="local")
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
