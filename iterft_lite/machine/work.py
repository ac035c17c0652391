"""How much each step of a plan does, in the unit that its seconds grow with: as it was done, and as it can be foreseen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from iterft_lite.backends.judge.prices import tokens_of
from iterft_lite.digests import Json
from iterft_lite.experiment.losses import LOSSES
from iterft_lite.experiment.plan import Plan
from iterft_lite.experiment.steps import Step
from iterft_lite.experiment.verbs import VERBS, Act


@dataclass(frozen=True)
class Timed:
    """What is known of an act.

    Attributes:
        words: What is being done.
        unit: What its seconds grow with: tokens in the loss, tokens written, tokens read, verdicts; "" where each time takes as
            long.
        libraries: Packages whose versions decide how long it takes.
    """

    words: str
    unit: str
    libraries: tuple[str, ...]


LLAMA = ("llama-cpp-python",)

ACTS: Mapping[Act, Timed] = {
    "load": Timed("loading", "", ("torch", "transformers", "unsloth", "bitsandbytes")),
    "train": Timed("training", "tokens", ("torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes")),
    "export": Timed("exporting", "", LLAMA),
    "write": Timed("writing", "tokens", LLAMA),
    "read": Timed("reading", "tokens", LLAMA),
    "judge": Timed("judging", "calls", ()),
}


@dataclass(frozen=True)
class Span:
    """Seconds or an amount of work: the least, the likely, the most. Spans add up, and a number multiplies them."""

    low: float
    mid: float
    high: float

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def __mul__(self, factor: float) -> Span:
        return Span(self.low * factor, self.mid * factor, self.high * factor)

    def each(self, change: Callable[[float], float]) -> Span:
        """A function of each of the three."""
        return Span(change(self.low), change(self.mid), change(self.high))

    def widened(self, factor: float) -> Span:
        """With a factor either way."""
        return Span(self.low / factor, self.mid, self.high * factor)


NOTHING = Span(0.0, 0.0, 0.0)


def exactly(amount: float) -> Span:
    """An amount that is known."""
    return Span(float(amount), float(amount), float(amount))


def total(spans: Iterable[Span]) -> Span:
    """The sum."""
    return sum(spans, NOTHING)


# -- what a step says by itself


def rows_asked(step: Step) -> int:
    """Rows that a sampling step writes."""
    return len(step.params["prompts"]) * int(step.params["samples"])


def verdicts(plan: Plan, step: Step) -> int:
    """Verdicts that a judge step asks for."""
    return rows_asked(plan.inputs(step)["answers"]) * len(step.params["rubrics"]) * int(step.params["judge"]["samples"])


def row_tokens(row: Mapping[str, Json]) -> int:
    """Tokens, about, of a row that a loss is taken over: of a whole document, or of a chat's last turn."""
    return tokens_of(str(row["text"]) if "text" in row else str(row["messages"][-1]["content"]))


def _held_out_tokens(step: Step) -> int:
    """Tokens, about, of the texts that a text_metrics step reads beside the answers."""
    return sum(map(row_tokens, [*step.params["high"], *step.params["low"]]))


# -- afterwards


def work_done(plan: Plan, step: Step, results: Mapping[str, Json]) -> tuple[dict[str, float], dict[str, float]]:
    """What a finished step did, by unit, and notes on the rows that it wrote (see `timing.Sample`)."""
    match VERBS[step.verb].act:
        case "train":
            return {"steps": results["steps"], "tokens": results["tokens"]}, {}
        case "write":
            notes = {"cap": step.params["sampling"]["max_tokens"], "cut": results["cut"], "data": float(_is_data(step))}
            return {"rows": results["rows"], "tokens": results["tokens"]}, notes
        case "read":
            answers = results["tokens"] * rows_asked(plan.inputs(step)["answers"])  # the result is the mean of an answer
            return {"tokens": answers + _held_out_tokens(step)}, {}
        case "judge":
            return {"calls": results["calls"]}, {}
        case _:
            return {}, {}


def _is_data(step: Step) -> bool:
    return step.verb == "training_samples"


# -- before


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows that a model writes, as it wrote them before.

    Attributes:
        data, answers: For rows to train on and for answers, of each step that was timed: mean tokens a row, most tokens a row,
            share of rows that reached that.
    """

    data: tuple[tuple[float, float, float], ...] = ()
    answers: tuple[tuple[float, float, float], ...] = ()

    def of(self, cap: int, *, data: bool, seeds: float) -> Span:
        """Tokens of a row of at most `cap`: what was measured, else from the seed rows' length up to the most.

        A row that was cut might have gone on to the new maximum.
        """
        known = (self.data or self.answers) if data else (self.answers or self.data)
        if not known:
            least = min(float(cap), seeds or 1.0)
            return Span(least, math.sqrt(least * cap), float(cap))
        means = [min(mean, cap) for mean, _, _ in known]
        # rows that reached the old maximum are longer than was seen, by at most the difference to the new one
        most = max(mean + cut * max(0.0, cap - before) for mean, before, cut in known)
        return Span(min(means), fmean(means), min(float(cap), most))


def work_ahead(plan: Plan, step: Step, lengths: Lengths) -> Span:
    """How much a step will do, in its act's unit; 1 for an act without one."""
    match VERBS[step.verb].act:
        case "train":
            return _trained(plan, step, lengths)
        case "write":
            return _sampled(plan, step, lengths)
        case "read":
            return _sampled(plan, plan.inputs(step)["answers"], lengths) + exactly(_held_out_tokens(step))
        case "judge":
            return exactly(verdicts(plan, step))
        case _:
            return exactly(1.0)


def row_length(plan: Plan, lengths: Lengths) -> Span:
    """Tokens of a row that the plan's models write, of data and answers together."""
    caps = [step.params["sampling"]["max_tokens"] for step in plan if VERBS[step.verb].act == "write"]
    both = Lengths(lengths.data + lengths.answers)
    return both.of(max(caps, default=0), data=True, seeds=_seed_tokens(plan))


def _sampled(plan: Plan, step: Step, lengths: Lengths) -> Span:
    cap = int(step.params["sampling"]["max_tokens"])
    return lengths.of(cap, data=_is_data(step), seeds=_seed_tokens(plan)) * rows_asked(step)


def _trained(plan: Plan, step: Step, lengths: Lengths) -> Span:
    """Tokens in the loss of a training: rows x epochs x the tokens of a row."""
    settings, recipe = step.params["settings"], plan.recipe
    seeds, cycle = _seed_tokens(plan), plan.inputs(step)["rows"].cycle
    counts = [recipe.seed_rows, *[recipe.rows] * cycle]  # of D[0] to D[t], each by itself
    # all of D[0] to D[t] where rows accumulate; else as many as the cycle's own, however large the pool is
    rows = sum(counts) if recipe.data == "accumulate" else min(sum(counts), counts[-1])
    own = exactly(seeds) if cycle == 0 else lengths.of(recipe.sample.max_tokens, data=True, seeds=seeds)
    longest, epochs = int(settings["max_length"]), int(settings["epochs"])
    return own.each(lambda tokens: min(tokens, longest)) * (LOSSES[step.params["loss"]].sides * rows * epochs)


def _seed_tokens(plan: Plan) -> float:
    """Tokens, about, of a seed row on the mean; 0 where there are none."""
    rows = [row for step in plan if step.verb == "seed_rows" for row in step.params["rows"]]
    return fmean(map(row_tokens, rows)) if rows else 0.0
