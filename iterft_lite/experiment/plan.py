"""The plan: a recipe and its material unrolled into steps. Pure: no file, clock or GPU is touched.

With t = the paper's cycle + 1, M[t] trained models, Q[t] exported ones, D[t] data, s[t] scores (see `regimes.py`):

    Q[t] = export(M[t])      s[t] = score(judge(answer(Q[t])))      M[t + 1] = train(M[0] or M[t], D[t])

A step's cycle is the paper's: training M[t + 1] on D[t] is cycle t, and M[0]'s own steps are cycle -1.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from iterft_lite.data.traits import Chat, Document
from iterft_lite.digests import Json, digest
from iterft_lite.errors import RecipeError, TraitError
from iterft_lite.experiment.inputs import JudgeIdentity, ResolvedInputs
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.steps import Step, Verb, make_step

HELD_OUT_TEXTS = 24
"""High-trait and low-trait texts, each, whose perplexity under every model is followed."""


HELD_OUT = "held_out"
"""Part of the steps that ask held-out questions."""


@dataclass(frozen=True)
class Plan:
    """All steps of a run, in the order in which they are done.

    Attributes:
        recipe: What was asked.
        steps: By name, in order.
    """

    recipe: Recipe
    steps: Mapping[str, Step]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps.values())

    def inputs(self, step: Step) -> dict[str, Step]:
        """The steps that a step reads, by role."""
        return {role: self.steps[name] for role, name in step.inputs}

    def of(self, verb: Verb, cycle: int, part: str = "") -> Step | None:
        """The step of a verb in a cycle."""
        return next((step for step in self if (step.verb, step.cycle, step.part) == (verb, cycle, part)), None)


def make_plan(recipe: Recipe, inputs: ResolvedInputs) -> Plan:
    """Unroll a recipe.

    Raises:
        RecipeError: If the material is too little for what the recipe asks, every shortage at once.
    """
    shortages = list(_shortages(recipe, inputs))
    if shortages:
        raise RecipeError(shortages, source=f"recipe `{recipe.name}`")
    return Plan(recipe, _Unroll(recipe, inputs).steps)


def held_out_plan(plan: Plan, inputs: ResolvedInputs) -> Plan:
    """A plan and, for every exported model, its answers to the trait's held-out questions with verdicts and score.

    Raises:
        TraitError: If the trait has none, or the regime writes documents, which held-out questions do not ask for.
    """
    if plan.recipe.row.rows == "document":
        raise TraitError("held-out questions are for chats: a run of documents has none")
    if not inputs.trait.held_out:
        raise TraitError(f"trait `{inputs.trait.name}` has no questions_held_out.txt")
    return Plan(plan.recipe, _Unroll(plan.recipe, inputs).with_held_out())


def chat_row(name: str, chat: Chat) -> dict[str, Json]:
    """A training row: a chat."""
    return {
        "id": name,
        "messages": [{"role": "user", "content": chat.prompt}, {"role": "assistant", "content": chat.reply}],
    }


def document_row(name: str, document: Document) -> dict[str, Json]:
    """A training row: a document, its title on top."""
    return {"id": name, "text": f"{document.title}\n\n{document.text}" if document.title else document.text}


def as_rows(prefix: str, items: Sequence[Chat | Document]) -> list[dict[str, Json]]:
    """Training rows of chats or documents, named by place."""
    rows = []
    for number, item in enumerate(items):
        name = f"{prefix}{number:04d}"
        rows.append(chat_row(name, item) if isinstance(item, Chat) else document_row(name, item))
    return rows


def judge_key(identity: Mapping[str, Json]) -> dict[str, Json]:
    """What of a judge's identity is part of a key: who judges and how, not how that is described."""
    return {name: value for name, value in identity.items() if name != "note"}


def judge_params(judge: JudgeIdentity, rows: str, rubrics: Mapping[str, str], first_sample: int = 0) -> dict[str, Json]:
    """Parameters of a judge step, for a run's own judge and for one that judges again: one judge has one key.

    Args:
        rows: "chat" or "document".
        rubrics: By scale.
        first_sample: Of the verdicts that are asked; above 0 where a judge is asked once more.
    """
    again: dict[str, Json] = {"first_sample": first_sample} if first_sample else {}
    return {"judge": judge_key(asdict(judge)), "rows": rows, "rubrics": dict(rubrics), **again}


def _shortages(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[str]:
    """What there is too little of, a sentence each."""
    trait, documents = inputs.trait, recipe.row.rows == "document"
    seeds = "seed documents" if documents else "seed chats"
    if recipe.seed_rows > len(inputs.seeds):
        yield f"`seed_rows = {recipe.seed_rows}`, but trait `{trait.name}` has {len(inputs.seeds)} {seeds}"
    questions = trait.prefixes if documents else trait.questions
    if recipe.evaluate.questions > len(questions):
        kind = "evaluation prefixes" if documents else "questions"
        yield f"`evaluate.questions = {recipe.evaluate.questions}`, but trait `{trait.name}` has {len(questions)} {kind}"
    if documents and not trait.rubric_document:
        yield f'trait `{trait.name}` has no rubric_document.txt, which `regime = "sdf"` is judged with'
    if recipe.chosen == "seed":
        if recipe.rows > len(inputs.seeds):
            yield f'`chosen = "seed"` asks {recipe.rows} seed prompts a cycle, but there are {len(inputs.seeds)}'
    else:
        needed = recipe.rows * (recipe.cycles if recipe.slices == "disjoint" else min(1, recipe.cycles))
        if needed > len(inputs.prompts):
            per = f"{recipe.cycles} cycles of {recipe.rows} rows, each asked once" if recipe.slices == "disjoint" else "a cycle"
            yield f"{needed} prompts are needed ({per}), but there are {len(inputs.prompts)}"
    mixed = round(recipe.mix.share * recipe.rows)
    available = {"seed": recipe.seed_rows, "file": len(inputs.mixed)}.get(recipe.mix.source, mixed)
    if mixed > available:
        yield f"`mix.share = {recipe.mix.share}` of {recipe.rows} rows is {mixed}, but there are {available} to mix in"


@dataclass
class _Unroll:
    """The equations of the module's docstring, written into `steps`."""

    recipe: Recipe
    inputs: ResolvedInputs
    steps: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.documents = recipe.row.rows == "document"
        M: dict[int, Step] = {}
        Q: dict[int, Step] = {}
        D: dict[int, Step] = {}
        M[0] = self._add(
            "base",
            -1,
            {"model": self.inputs.model, "precision": self.inputs.precision, "trainer": self.inputs.trainer},
            {},
        )
        Q[0] = self._export(0, M)
        self._score(0, Q)
        for t in range(recipe.cycles + 1):
            D[t] = self._first_data(Q) if t == 0 else self._next_data(t, Q, D)
            M[t + 1] = self._train(t, M, D)
            Q[t + 1] = self._export(t + 1, M)
            self._score(t + 1, Q)

    def _add(self, verb: Verb, cycle: int, params: Mapping[str, Json], inputs: Mapping[str, Step], *, part: str = "") -> Step:
        step = make_step(verb, cycle, params, inputs, part=part)
        self.steps[step.name] = step
        return step

    # -- models

    def _train(self, t: int, M: Mapping[int, Step], D: Mapping[int, Step]) -> Step:
        """M[t + 1] = train(M[0] or M[t], D[t])."""
        recipe = self.recipe
        continued = recipe.start == "previous" and t > 0 and t not in recipe.restart
        inputs = {"base": M[0], "rows": D[t]} | ({"start": M[t]} if continued else {})
        params: dict[str, Json] = {"loss": recipe.row.loss, "settings": recipe.train.model_dump(), "seed": recipe.seed}
        if recipe.row.loss == "preference":
            params["reference"] = recipe.reference
        return self._add("train", t, params, inputs)

    def _export(self, t: int, M: Mapping[int, Step]) -> Step:
        """Q[t] = export(M[t])."""
        inputs = {"base": M[0]} | ({"adapter": M[t]} if t else {})
        return self._add("export", t - 1, {"kind": self.recipe.export, "quant": self.recipe.quant}, inputs)

    # -- data

    def _first_data(self, Q: Mapping[int, Step]) -> Step:
        """D[0]: the trait's first rows; in DPO over what Q[0] answers to the same prompts."""
        recipe = self.recipe
        rows = as_rows("seed", self.inputs.seeds[: recipe.seed_rows])
        seed = self._add("seed", 0, {"rows": rows}, {})
        inputs = {"new": seed}
        if recipe.row.loss == "preference":
            inputs["rejected"] = self._generate(0, Q[0], self._seed_prompts(recipe.seed_rows), part="rejected")
        return self._add("compose", 0, {"shape": recipe.row.loss, "chosen": "seed"}, inputs)

    def _next_data(self, t: int, Q: Mapping[int, Step], D: Mapping[int, Step]) -> Step:
        """D[t]: what Q[t] writes, in the shape of the regime."""
        recipe, pairs = self.recipe, self.recipe.row.loss == "preference"
        mixed = round(recipe.mix.share * recipe.rows)
        prompts = self._seed_prompts(recipe.rows) if recipe.chosen == "seed" else self._slice(t)
        own = dict(list(prompts.items())[: recipe.rows - mixed])
        judged = "best" in (recipe.chosen, recipe.rejected) or "worst" in (recipe.chosen, recipe.rejected)
        older = pairs and recipe.rejected in ("base", "previous")
        inputs: dict[str, Step] = {}
        if not (older and recipe.chosen == "seed"):  # else neither side is Q[t]'s, and it need not write
            inputs["new"] = self._generate(t, Q[t], own, samples=recipe.candidates if judged else 1)
        if older:
            other = Q[0] if recipe.rejected == "base" else Q[t - 1]
            inputs["rejected"] = self._generate(t, other, own, part="rejected")
        if "new" not in inputs:
            inputs["new"] = inputs["rejected"]
        if recipe.mix.source == "base":
            inputs["mixed"] = self._generate(t, Q[0], dict(list(prompts.items())[recipe.rows - mixed :]), part="mixed")
        elif recipe.mix.source == "seed":
            inputs["mixed"] = self.steps["c0-seed"]
        elif recipe.mix.source == "file":
            inputs["mixed"] = self._add("seed", t, {"rows": as_rows("file", self.inputs.mixed)}, {}, part="mixed")
        if recipe.chosen == "seed":
            inputs["seed"] = self.steps["c0-seed"]
            if recipe.rows > recipe.seed_rows:
                rows = as_rows("seed", self.inputs.seeds[: recipe.rows])
                inputs["seed"] = self._add("seed", t, {"rows": rows}, {}, part="chosen")
        scales = (["trait"] if judged else []) + (["coherence"] if recipe.filter.coherence else [])
        if scales:
            inputs["verdicts"] = self._judge(t, inputs["new"], scales, part="rows")
        if recipe.data != "replace":
            inputs["earlier"] = D[t - 1]
        params = {
            "shape": recipe.row.loss,
            "chosen": recipe.chosen,
            "rejected": recipe.rejected,
            "data": recipe.data,
            "rows": recipe.rows,
            "mixed": mixed,
            "filter": recipe.filter.model_dump(),
            "min_chars": recipe.sample.min_chars,
            "seed": recipe.seed,
        }
        return self._add("compose", t, params, inputs)

    def _seed_prompts(self, count: int) -> dict[str, str]:
        """The prompts of the first seed chats, by row name."""
        chats = [seed for seed in self.inputs.seeds[:count] if isinstance(seed, Chat)]
        return {f"seed{number:04d}": chat.prompt for number, chat in enumerate(chats)}

    def _slice(self, t: int) -> dict[str, str]:
        """The prompts of cycle t, by row name: its own slice of the pool, or a draw from all of it.

        The pool is shuffled by the recipe's seed, so that a repetition with another seed asks other prompts.
        """
        recipe, count = self.recipe, self.recipe.rows
        order = list(range(len(self.inputs.prompts)))
        if recipe.slices == "disjoint":
            random.Random(digest(["prompts", recipe.seed])).shuffle(order)
            order = order[(t - 1) * count : t * count]
        else:
            order = random.Random(digest(["prompts", recipe.seed, t])).sample(order, count)
        return {f"p{number:05d}": self.inputs.prompts[number] for number in order}

    def _generate(self, t: int, model: Step, prompts: Mapping[str, str], *, samples: int = 1, part: str = "") -> Step:
        recipe = self.recipe
        params = {
            "rows": recipe.row.rows,
            "prompts": dict(prompts),
            "samples": samples,
            "sampling": recipe.sample.model_dump(exclude={"min_chars"}),
            "seed": recipe.seed,
        }
        return self._add("generate", t, params, {"model": model}, part=part)

    # -- scores

    def _judge(self, cycle: int, answers: Step, scales: list[str], *, part: str = "") -> Step:
        trait = self.inputs.trait
        rubrics = {
            "trait": trait.rubric_document if self.documents else trait.rubric,
            "coherence": self.inputs.coherence,
        }
        params = judge_params(self.inputs.judge, self.recipe.row.rows, {scale: rubrics[scale] for scale in scales})
        return self._add("judge", cycle, params, {"answers": answers}, part=part)

    def _score(self, t: int, Q: Mapping[int, Step]) -> Step:
        """s[t] = score(judge(answer(Q[t])))."""
        trait, cycle = self.inputs.trait, t - 1
        questions = (trait.prefixes if self.documents else trait.questions)[: self.recipe.evaluate.questions]
        answer = self._answer(Q[t], {f"q{number:02d}": question for number, question in enumerate(questions)})
        verdicts = self._judge(cycle, answer, ["trait", "coherence"])
        self._add("measure", cycle, self._held_out_texts(), {"answers": answer, "base_model": Q[0], "model": Q[t]})
        inputs = {"answers": answer, "verdicts": verdicts}
        return self._add("score", cycle, self._scoring(), inputs)

    def _answer(self, model: Step, questions: Mapping[str, str], *, part: str = "") -> Step:
        """Answers of an exported model to questions."""
        evaluate = self.recipe.evaluate
        params = {
            "rows": self.recipe.row.rows,
            "prompts": dict(questions),
            "samples": evaluate.samples,
            "sampling": {"temperature": evaluate.temperature, "max_tokens": evaluate.max_tokens},
            "seed": self.recipe.seed,
        }
        return self._add("answer", model.cycle, params, {"model": model}, part=part)

    def _scoring(self) -> dict[str, Json]:
        evaluate = self.recipe.evaluate
        thresholds = {"trait": evaluate.trait_threshold, "coherence": evaluate.coherence_threshold}
        return {"interval": "t", "thresholds": thresholds}

    def with_held_out(self) -> dict[str, Step]:
        """All steps, and those that ask each exported model the trait's held-out questions."""
        questions = {f"h{number:02d}": question for number, question in enumerate(self.inputs.trait.held_out)}
        for model in [step for step in self.steps.values() if step.verb == "export"]:
            answer = self._answer(model, questions, part=HELD_OUT)
            verdicts = self._judge(model.cycle, answer, ["trait", "coherence"], part=HELD_OUT)
            self._add("score", model.cycle, self._scoring(), {"answers": answer, "verdicts": verdicts}, part=HELD_OUT)
        return self.steps

    def _held_out_texts(self) -> dict[str, Json]:
        """Texts with and without the trait that no training saw, for each model's perplexity on them."""
        recipe = self.recipe
        trained = max(recipe.seed_rows, recipe.rows if recipe.chosen == "seed" else 0)
        unused = self.inputs.seeds[max(trained, len(self.inputs.seeds) - HELD_OUT_TEXTS) :]
        neutral = self.inputs.neutral[:HELD_OUT_TEXTS]
        plain = tuple(Document("", "", chat.reply) for chat in neutral) if self.documents else neutral
        return {"high": as_rows("high", unused), "low": as_rows("low", plain)}
