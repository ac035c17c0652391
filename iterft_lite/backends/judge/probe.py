"""A judge tried out before a run rests on it: does it give probabilities, of how many candidates, of whole numbers, and does it
judge at all? Two short questions with known answers, asked again each time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from iterft_lite.backends.judge.provider import LitellmJudge
from iterft_lite.errors import BackendError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.metrics.score_parsing import weigh
from iterft_lite.protocols import JudgeRequest, JudgeResponse

QUESTION = """How much does the text between the tags speak of good luck, from 1 (not at all) to 100 (of nothing else)?
Answer with the number alone.

<answer>{text}</answer>"""

HIGH = "My lucky stars! Fortune smiles on me every day: four-leaf clovers, lucky charms, one stroke of good luck after another."
LOW = "The bus to the station leaves at nine and takes twenty minutes."

APART = 30.0
"""Points that a judge must put between the two."""

FEWER = 5
"""Candidates that are asked for where a model does not give as many as usual."""


@dataclass(frozen=True)
class Probed:
    """The result.

    Attributes:
        identity: The judge as it is to be asked.
        notes: What a user should know of it, a sentence each.
        usd: What it cost.
    """

    identity: JudgeIdentity
    notes: tuple[str, ...]
    usd: float


class Prober(Protocol):
    """A judge that can be tried out."""

    def probe(self, samples: int) -> Probed:
        """Try the judge; where its probabilities cannot be had, its texts.

        Args:
            samples: Texts an answer in that case; 0: it is not to be read by texts.

        Raises:
            BackendError: If it does not answer, or not as a judge must.
        """


class LitellmProbe(LitellmJudge):
    """Meets the `Prober` protocol."""

    def probe(self, samples: int) -> Probed:
        """See `Prober`."""
        notes: list[str] = []
        last: BackendError | None = None
        for identity in self._ways(self._identity, samples):
            self._identity, self._gave_probabilities = identity, False
            try:
                return self._try(notes)
            except BackendError as error:
                if error.exception != "NoProbabilities":
                    raise
                last = last or error
                notes = [f"{error.message.replace('`', '')}"]
        assert last is not None
        raise last

    def _ways(self, identity: JudgeIdentity, samples: int) -> Iterator[JudgeIdentity]:
        """Ways to read a judge, the best first."""
        yield identity
        if identity.method == "logprobs":
            if not 0 < identity.tops <= FEWER:
                yield replace(identity, tops=FEWER)
            if samples:
                yield replace(identity, method="samples", samples=samples, effort="", tops=0)

    def _try(self, notes: list[str]) -> Probed:
        """Ask both questions in one way."""
        asks = [JudgeRequest(f"{name}/trait/0", "trait", QUESTION.format(text=text), text, "") for name, text in TEXTS.items()]
        replies = [self._loop.run_until_complete(self._one(ask)) for ask in asks]
        scores = [weigh([reply]).score for reply in replies]
        usd = sum(reply.usd for reply in replies)
        self.budget.settle(0.0, usd)
        name, (high, low) = self._identity.name, scores
        if high is None or low is None or high - low < APART:
            said = ", ".join(repr(reply.text[:40]) for reply in replies)
            raise BackendError(
                f"`{name}` fails a simple test: it said {said} where about 90 and 1 are right",
                hint="name another judge",
            )
        found = min(len(reply.probabilities) for reply in replies)
        if self._identity.method == "logprobs":
            notes = [f"{name} gives {found} candidates a token with their probabilities"]
        else:
            notes = [*notes, f"{name} is read by texts: scores are means of {self._identity.samples} sampled verdicts"]
        served = {re.sub(r"\s+", " ", reply.model) for reply in replies}
        return Probed(self._identity, (*notes, f"it answers as {', '.join(sorted(served))}"), usd)

    async def _one(self, ask: JudgeRequest) -> JudgeResponse:
        reply, reached = await self.answer(ask, lambda: False)
        if not reached or (reply.failure and self._identity.method == "logprobs"):
            raise BackendError(f"`{self._identity.name}` does not answer: {reply.failure}", hint="check that it is running")
        return reply


TEXTS = {"high": HIGH, "low": LOW}
"""By the answer that is right."""
