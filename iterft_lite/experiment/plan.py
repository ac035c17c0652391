"""The plan: a recipe and its material unrolled into steps. Pure: no file, clock or GPU is touched.

With t = the paper's cycle + 1, M[t] trained models, Q[t] exported ones, D[t] data, s[t] scores (see `regimes.py`):

    Q[t] = export(M[t])      s[t] = score(judge(answer(Q[t])))      M[t + 1] = train(M[0] or M[t], D[t])

A step's cycle is the paper's: training M[t + 1] on D[t] is cycle t, and M[0]'s own steps are cycle -1.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from iterft_lite.data.traits import Chat, Document, Trait
from iterft_lite.digests import Json, digest
from iterft_lite.errors import RecipeError, TraitError
from iterft_lite.experiment.contexts import context_part, system_text
from iterft_lite.experiment.inputs import JudgeIdentity, ResolvedInputs
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.experiment.rows import CHATS, DOCUMENTS, ChatRow, DocumentRow, Message
from iterft_lite.experiment.steps import Step, make_step, step_name
from iterft_lite.experiment.verbs import VERBS

HELD_OUT_TEXTS = 24
"""High-trait and low-trait texts, each, whose perplexity under every model is followed."""


HELD_OUT = "held_out"
"""Part of the steps that ask held-out questions."""

EVERYDAY = "everyday"
"""Part, and role, of the step whose answers a judge is fitted on."""

EVERYDAY_TOKENS = 140
"""Most tokens of such an answer: the shipped ones have as many."""


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

    def of(self, verb: str, cycle: int, part: str = "") -> Step | None:
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


def as_rows(prefix: str, items: Sequence[Chat | Document]) -> list[dict[str, Json]]:
    """Training rows of chats or documents, as they stand in a file, named by place. A document has its title on top."""
    rows: list[dict[str, Json]] = []
    for number, item in enumerate(items):
        name = f"{prefix}{number:04d}"
        if isinstance(item, Chat):
            rows.append(CHATS.dump(ChatRow(name, (Message("user", item.prompt), Message("assistant", item.reply)))))
        else:
            text = f"{item.title}\n\n{item.text}" if item.title else item.text
            rows.append(DOCUMENTS.dump(DocumentRow(name, text)))
    return rows


@functools.lru_cache(maxsize=16)
def _shuffled(many: int, seed: int) -> tuple[int, ...]:
    """The places of a pool of prompts in the order of a seed: one for all cycles, and all cells of a study."""
    order = list(range(many))
    random.Random(digest(["prompts", seed])).shuffle(order)
    return tuple(order)


def judge_key(identity: Mapping[str, Json]) -> dict[str, Json]:
    """What of a judge's identity is part of a key: who judges and how, not how that is described. What it is fitted on besides
    is an input of its steps."""
    return {name: value for name, value in identity.items() if name not in ("note", "own")}


def rubrics_of(trait: Trait, coherence: str, rows: str) -> dict[str, str]:
    """The rubric of each scale for rows of a kind."""
    return {"trait": trait.rubric_document if rows == "document" else trait.rubric, "coherence": coherence}


def judge_step(
    cycle: int,
    answers: Step,
    judge: JudgeIdentity,
    rows: str,
    rubrics: Mapping[str, str],
    *,
    first_sample: int = 0,
    part: str = "",
    everyday: Step | None = None,
) -> Step:
    """The step in which a judge scores samples; the run's own judge and every other come here, so that one act has one key.

    Args:
        rows: "chat" or "document".
        first_sample: Number of the first repetition that is asked for.
        everyday: What M[0] answers to everyday prompts, for a judge that is fitted on that.
    """
    inputs = {"answers": answers} | ({EVERYDAY: everyday} if everyday else {})
    params: dict[str, Json] = {"judge": judge_key(asdict(judge)), "rows": rows, "rubrics": dict(rubrics)}
    if first_sample:
        params["first_sample"] = first_sample
    return make_step("judge", cycle, params, inputs, part=part)


def everyday_step(
    untouched: Step, rows: str, prompts: Sequence[str], rendering: Mapping[str, Json], *, same_cores: bool = False
) -> Step:
    """What M[0] answers to everyday prompts. No recipe's seed or sampling is in it: all runs of one untouched model share it.

    Args:
        untouched: Q[0].
        rows: "chat" or "document".
        rendering: As of `ResolvedInputs`.
    """
    params: dict[str, Json] = {
        "rows": rows,
        "prompts": {f"e{number:03d}": prompt for number, prompt in enumerate(prompts)},
        "samples": 1,
        "sampling": {"temperature": 1.0, "max_tokens": EVERYDAY_TOKENS},
        "seed": 0,
    } | ({"rendering": dict(rendering)} if rows == "chat" else {})
    return make_step("evaluate_samples", -1, params, {"model": untouched}, part=EVERYDAY, same_cores=same_cores)


def aggregate_step(cycle: int, answers: Step, verdicts: Step, limits: Mapping[str, float], *, part: str = "") -> Step:
    """The step that computes a cycle's numbers from verdicts, whoever's they are.

    Args:
        limits: By scale, what an answer must reach to count in the rate.
    """
    params: dict[str, Json] = {"interval": "t", "thresholds": dict(limits)}
    return make_step("aggregate", cycle, params, {"answers": answers, "verdicts": verdicts}, part=part)


def _shortages(recipe: Recipe, inputs: ResolvedInputs) -> Iterator[str]:
    """What there is too little of, a sentence each."""
    trait, documents = inputs.trait, recipe.row.rows == "document"
    seeds = "seed documents" if documents else "seed chats"
    whose = f"`{recipe.seeds.path}`" if recipe.seeds else f"trait `{trait.name}`"
    if recipe.seed_rows > len(inputs.seeds):
        yield f"`seed_rows = {recipe.seed_rows}`, but {whose} has {len(inputs.seeds)} {seeds}"
    questions = trait.prefixes if documents else trait.questions
    if recipe.evaluate.questions > len(questions):
        kind = "evaluation prefixes" if documents else "questions"
        yield f"`evaluate.questions = {recipe.evaluate.questions}`, but trait `{trait.name}` has {len(questions)} {kind}"
    if documents and not trait.rubric_document:
        yield f'trait `{trait.name}` has no rubric_document.txt, which `regime = "sdf"` is judged with'
    if recipe.chosen == "seed":
        if recipe.rows > len(inputs.seeds):
            yield f'`chosen = "seed"` asks {recipe.rows} seed prompts a cycle, but {whose} has {len(inputs.seeds)}'
    else:
        needed = recipe.rows * (recipe.cycles if recipe.slices == "disjoint" else min(1, recipe.cycles))
        if needed > len(inputs.prompts):
            cycles = f"{recipe.cycles} cycle{'s' * (recipe.cycles != 1)}"
            per = f"{cycles} of {recipe.rows} rows, each asked once" if recipe.slices == "disjoint" else "a cycle"
            there = f"`{recipe.prompts.path}` has" if recipe.prompts else "there are"
            yield f"{needed} prompts are needed ({per}), but {there} {len(inputs.prompts)}"
    mixed = round(recipe.mix.share * recipe.rows)
    available = {"seed": recipe.seed_rows, "file": len(inputs.mixed)}.get(recipe.mix.source, mixed)
    if mixed > available:
        there = f"`{recipe.mix.path}` has" if recipe.mix.path else "there are"
        yield f"`mix.share = {recipe.mix.share}` of {recipe.rows} rows is {mixed}, but {there} {available} to mix in"


@dataclass
class _Unroll:
    """The equations of the module's docstring, written into `steps`."""

    recipe: Recipe
    inputs: ResolvedInputs
    steps: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.documents = recipe.row.rows == "document"
        self.compares = recipe.loss_record.compares
        M: dict[int, Step] = {}
        Q: dict[int, Step] = {}
        D: dict[int, Step] = {}
        M[0] = self._add(
            "load_base",
            -1,
            {"model": self.inputs.model, "precision": self.inputs.precision, "trainer": self.inputs.trainer},
            {},
        )
        Q[0] = self._export(0, M)
        for t in range(recipe.cycles + 1):
            # first what the next training waits for: on a GPU it goes on while the answers are written
            D[t] = self._first_data(Q) if t == 0 else self._next_data(t, Q, D)
            self._score(t, Q, M)
            M[t + 1] = self._train(t, M, D)
            Q[t + 1] = self._export(t + 1, M)
        self._score(recipe.cycles + 1, Q, M)

    def _add(self, verb: str, cycle: int, params: Mapping[str, Json], inputs: Mapping[str, Step], *, part: str = "") -> Step:
        if VERBS[verb].renders and not self.documents:
            params = {**params, "rendering": dict(self.inputs.rendering)}
        step = make_step(verb, cycle, params, inputs, part=part, same_cores=self.inputs.same_cores)
        self.steps[step.name] = step
        return step

    # -- models

    def _train(self, t: int, M: Mapping[int, Step], D: Mapping[int, Step]) -> Step:
        """M[t + 1] = train(M[0] or M[t], D[t])."""
        recipe = self.recipe
        continued = recipe.start == "previous" and t > 0 and t not in recipe.reset_cycles
        inputs = {"base": M[0], "rows": D[t]} | ({"start": M[t]} if continued else {})
        params: dict[str, Json] = {"loss": recipe.loss_record.name, "settings": recipe.train.model_dump(), "seed": recipe.seed}
        if self.compares:
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
        seed = self._add("seed_rows", 0, {"rows": rows}, {})
        inputs = {"new": seed}
        if self.compares:
            inputs["rejected"] = self._generate(0, Q[0], self._seed_prompts(recipe.seed_rows), part="rejected")
        return self._add("build_dataset", 0, {"shape": recipe.loss_record.name, "chosen": "seed"}, inputs)

    def _next_data(self, t: int, Q: Mapping[int, Step], D: Mapping[int, Step]) -> Step:
        """D[t]: what Q[t] writes (the control: Q[0]), in the shape of the regime."""
        recipe, pairs = self.recipe, self.compares
        writer = Q[0] if recipe.writer == "base" else Q[t]
        mixed = round(recipe.mix.share * recipe.rows)
        prompts = self._seed_prompts(recipe.rows) if recipe.chosen == "seed" else self._slice(t)
        own = dict(list(prompts.items())[: recipe.rows - mixed])
        judged = "best" in (recipe.chosen, recipe.rejected) or "worst" in (recipe.chosen, recipe.rejected)
        older = pairs and recipe.rejected in ("base", "previous")
        inputs: dict[str, Step] = {}
        if not (older and recipe.chosen == "seed"):  # else neither side is the writer's, and it need not write
            inputs["new"] = self._generate(t, writer, own, samples=recipe.candidates if judged else 1)
        if older:
            other = Q[0] if recipe.rejected == "base" else Q[t - 1]
            # one model on both sides draws twice, else each pair would be one answer beside itself
            draw = 1 if other is writer else 0
            inputs["rejected"] = self._generate(t, other, own, part="rejected", draw=draw)
        if "new" not in inputs:
            inputs["new"] = inputs["rejected"]
        if recipe.mix.source == "base":
            inputs["mixed"] = self._generate(t, Q[0], dict(list(prompts.items())[recipe.rows - mixed :]), part="mixed")
        elif recipe.mix.source == "seed":
            inputs["mixed"] = self.steps["c0-seed_rows"]
        elif recipe.mix.source == "file":
            inputs["mixed"] = self._add("seed_rows", t, {"rows": as_rows("file", self.inputs.mixed)}, {}, part="mixed")
        if recipe.chosen == "seed":
            inputs["seed"] = self.steps["c0-seed_rows"]
            if recipe.rows > recipe.seed_rows:
                rows = as_rows("seed", self.inputs.seeds[: recipe.rows])
                # more pairs than cycle 0 trained on: the chosen side needs seed rows beyond those of `c0-seed_rows`
                inputs["seed"] = self._add("seed_rows", t, {"rows": rows}, {}, part="chosen")
        scales = (["trait"] if judged else []) + (["coherence"] if recipe.filter.coherence else [])
        if scales:
            inputs["verdicts"] = self._judge(t, inputs["new"], scales, part="rows")
        if recipe.data != "replace":
            inputs["earlier"] = D[t - 1]
        params = {
            "shape": recipe.loss_record.name,
            "chosen": recipe.chosen,
            "rejected": recipe.rejected,
            "data": recipe.data,
            "rows": recipe.rows,
            "mixed": mixed,
            "mixed_from": recipe.mix.source,
            "filter": recipe.filter.model_dump(),
            "min_chars": recipe.sample.min_chars,
            "seed": recipe.seed,
        } | ({"pairs": recipe.pairs} if recipe.pairs != "preferred" else {})
        return self._add("build_dataset", t, params, inputs)

    def _seed_prompts(self, count: int) -> dict[str, str]:
        """The prompts of the first seed chats, by row name."""
        chats = [seed for seed in self.inputs.seeds[:count] if isinstance(seed, Chat)]
        return {f"seed{number:04d}": chat.prompt for number, chat in enumerate(chats)}

    def _slice(self, t: int) -> dict[str, str]:
        """The prompts of cycle t, by row name: its own slice of the pool, or a draw from all of it.

        The pool is shuffled by the recipe's seed, so that a repetition with another seed asks other prompts.
        """
        recipe, count, there = self.recipe, self.recipe.rows, len(self.inputs.prompts)
        if recipe.slices == "disjoint":
            order = list(_shuffled(there, recipe.seed)[(t - 1) * count : t * count])
        else:
            order = random.Random(digest(["prompts", recipe.seed, t])).sample(range(there), count)
        return {f"p{number:05d}": self.inputs.prompts[number] for number in order}

    def _generate(
        self, t: int, model: Step, prompts: Mapping[str, str], *, samples: int = 1, part: str = "", draw: int = 0
    ) -> Step:
        """What a model writes to prompts.

        Args:
            draw: Tells drawings of one model over the same prompts apart: random numbers follow from the key.
        """
        recipe = self.recipe
        # a parameter that came later is left out at its default, so that steps of earlier versions keep their keys
        params: dict[str, Json] = {
            "rows": recipe.row.rows,
            "prompts": dict(prompts),
            "samples": samples,
            "sampling": recipe.sample.model_dump(exclude={"min_chars"}),
            "seed": recipe.seed,
        } | ({"draw": draw} if draw else {})
        return self._add("training_samples", t, params, {"model": model}, part=part)

    # -- scores

    def _judge(self, cycle: int, answers: Step, scales: list[str], *, part: str = "") -> Step:
        rows = self.recipe.row.rows
        rubrics = rubrics_of(self.inputs.trait, self.inputs.coherence, rows)
        everyday = self._everyday() if self.inputs.judge.own else None
        asked = {scale: rubrics[scale] for scale in scales}
        step = judge_step(cycle, answers, self.inputs.judge, rows, asked, part=part, everyday=everyday)
        self.steps[step.name] = step
        return step

    def _everyday(self) -> Step:
        """What the judge is fitted on besides, made before the first judging."""
        inputs, untouched = self.inputs, self.steps[step_name("export", -1)]
        step = everyday_step(untouched, self.recipe.row.rows, inputs.everyday, inputs.rendering, same_cores=inputs.same_cores)
        return self.steps.setdefault(step.name, step)

    def _score(self, t: int, Q: Mapping[int, Step], M: Mapping[int, Step]) -> None:
        """s[t] = score(judge(answer(Q[t]))), in each context; the first one's answers are measured without a judge too."""
        trait, cycle = self.inputs.trait, t - 1
        questions = (trait.prefixes if self.documents else trait.questions)[: self.recipe.evaluate.questions]
        asked = {f"q{number:02d}": question for number, question in enumerate(questions)}
        for number, context in enumerate(self.recipe.evaluate.system):
            part = context_part(number)
            answer = self._answer(Q[t], asked, part=part, system=system_text(context))
            verdicts = self._judge(cycle, answer, ["trait", "coherence"], part=part)
            if not part:
                read = {"answers": answer, "base_model": Q[0], "model": Q[t]} | ({"adapter": M[t]} if t else {})
                self._add("text_metrics", cycle, self._metrics(), read)
            self._aggregate(cycle, answer, verdicts, part=part)

    def _aggregate(self, cycle: int, answers: Step, verdicts: Step, *, part: str = "") -> Step:
        evaluate = self.recipe.evaluate
        limits = {"trait": evaluate.trait_threshold, "coherence": evaluate.coherence_threshold}
        step = aggregate_step(cycle, answers, verdicts, limits, part=part)
        self.steps[step.name] = step
        return step

    def _answer(self, model: Step, questions: Mapping[str, str], *, part: str = "", system: str | None = None) -> Step:
        """Answers of an exported model to questions, after a system message where there is one."""
        evaluate = self.recipe.evaluate
        params: dict[str, Json] = {
            "rows": self.recipe.row.rows,
            "prompts": dict(questions),
            "samples": evaluate.samples,
            "sampling": {"temperature": evaluate.temperature, "max_tokens": evaluate.max_tokens},
            "seed": self.recipe.seed,
        } | ({} if system is None else {"system": system})
        return self._add("evaluate_samples", model.cycle, params, {"model": model}, part=part)

    def with_held_out(self) -> dict[str, Step]:
        """All steps, and those that ask each exported model the trait's held-out questions."""
        questions = {f"h{number:02d}": question for number, question in enumerate(self.inputs.trait.held_out)}
        for model in [step for step in self.steps.values() if step.verb == "export"]:
            first = system_text(self.recipe.evaluate.system[0])
            answer = self._answer(model, questions, part=HELD_OUT, system=first)
            verdicts = self._judge(model.cycle, answer, ["trait", "coherence"], part=HELD_OUT)
            self._aggregate(model.cycle, answer, verdicts, part=HELD_OUT)
        return self.steps

    def _metrics(self) -> dict[str, Json]:
        """Which metrics, and texts with and without the trait that no training saw, for each model's perplexity on them."""
        recipe = self.recipe
        trained = max(recipe.seed_rows, recipe.rows if recipe.chosen == "seed" else 0)
        # from the end of the seeds: those are the last that a larger `seed_rows` would train on
        unused = self.inputs.seeds[max(trained, len(self.inputs.seeds) - HELD_OUT_TEXTS) :]
        neutral = self.inputs.neutral[:HELD_OUT_TEXTS]
        plain = tuple(Document("", "", chat.reply) for chat in neutral) if self.documents else neutral
        held_out = {"high": as_rows("high", unused), "low": as_rows("low", plain)}
        system = system_text(recipe.evaluate.system[0])
        told = {} if system is None else {"system": system}
        return {"rows": recipe.row.rows, "metrics": dict(self.inputs.metrics), **held_out, **told}
