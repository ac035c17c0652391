"""A recipe: one experiment as a TOML file. The only place where defaults live.

`read_recipe` gives a frozen `Recipe` or raises one `RecipeError` that lists every problem.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from iterft_lite.data.texts import read_user_text
from iterft_lite.digests import Json
from iterft_lite.errors import RecipeError
from iterft_lite.experiment import contexts
from iterft_lite.experiment.losses import LOSSES, Loss
from iterft_lite.experiment.recipe_keys import key_names, near_key
from iterft_lite.experiment.regimes import REGIMES, Regime, Start

MOST = 1_000_000
"""Of anything that is counted; more is a slip of the pen."""

MOST_ANSWERS = 5_000_000
"""Texts that a plan asks for, all cycles together: it is held in memory."""

LIMIT = 1 << 20
"""Bytes of a recipe."""

SHOWN = 200
"""Characters of a value that an error repeats."""


def _at_most(most: int) -> AfterValidator:
    """A bound that stands beside what a key means: the reference of keys does not show it."""

    def check(number: int) -> int:
        if number > most:
            raise PydanticCustomError("too_many", "at most {most}", {"most": f"{most:,}"})
        return number

    return AfterValidator(check)


Keep = Literal["all", "last", "adapters", "ends"]

HELD_IN_32_BITS = ("f32", "bf16-mixed")
"""Precisions whose base is in memory in 32 bits."""

K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m")
"""Formats of GGUF whose scales are searched for: a merged file takes half a minute at 4 B parameters, and predicts otherwise by
some hundredths of a nat."""

Positive = Annotated[int, Field(ge=1, strict=True), _at_most(MOST)]
Count = Annotated[int, Field(ge=0, strict=True), _at_most(MOST)]
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Temperature = Annotated[float, Field(ge=0.0, le=5.0)]


class Table(BaseModel):
    """A table of a recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class TrainSettings(Table):
    """How each M[t] is trained. Fields without a default here take the regime's (`regimes.py`).

    Attributes:
        learning_rate: Peak learning rate.
        schedule: After the warmup: constant, cosine to 0, or linear to 0.
        warmup: Share of the optimiser steps that warm up, rounded down to whole steps.
        batch_size: Rows (pairs in DPO) an optimiser step; the last batch of an epoch may be smaller and is kept.
        epochs: Passes over the rows.
        max_length: Tokens a row at most; longer rows are cut at the end.
        lora_rank: Rank of the adapter, on all seven projections of each layer.
        lora_alpha: The adapter is scaled by lora_alpha / lora_rank.
        weight_decay: AdamW's weight decay.
        max_grad_norm: Gradient norm is clipped to this; 0 means no clipping.
        beta1, beta2: How slowly AdamW forgets past gradients, and their squares.
        epsilon: What AdamW adds to the root of the mean square gradient.
        optimizer: Moments in 32 bits, or in 8 (bitsandbytes).
        base: Precision of the frozen base: "auto" is nf4 (QLoRA) on a GPU; on a CPU f32, or bf16-mixed where it has
            instructions for products in bf16: base and adapter are held in f32, the factors of products are rounded to bf16
            (in DPO those of backward passes only). Of the 16-bit ones f16 rounds eight times finer than bf16, and some models'
            activations leave its range.
        dpo_beta: The beta of DPO's loss (Rafailov et al. 2023, equation 7).
        dpo_nll_weight: Weight of an added mean negative log-likelihood of the chosen reply (RPO); the paper's loss has 0.
        micro_batch: Rows a forward pass; "auto" is the whole batch. Never changes what a batch means.
    """

    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "cosine", "linear"]
    warmup: Share = 0.05
    batch_size: Positive
    epochs: Positive = 1
    max_length: Annotated[int, Field(ge=16, strict=True)] = 8192
    lora_rank: Positive = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(ge=0)]
    beta1: Share = 0.9
    beta2: Share = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    optimizer: Literal["auto", "adamw", "adamw_8bit"] = "auto"
    base: Literal["auto", "f32", "bf16-mixed", "bf16", "f16", "nf4"] = "auto"
    dpo_beta: Annotated[float, Field(gt=0)] = 0.1
    dpo_nll_weight: Annotated[float, Field(ge=0)] = 0.0
    micro_batch: Positive | Literal["auto"] = "auto"


class SampleSettings(Table):
    """How Q[t] writes the next data. Truncation is off unless asked for: it sharpens a self-training loop by itself.

    Attributes:
        temperature: Softmax temperature; 0 is greedy.
        max_tokens: Tokens a row at most.
        top_k: Only so many of the likeliest tokens are drawn; 0 means all.
        top_p: Only the likeliest tokens that make up this share of the probability are drawn.
        min_p: Only tokens with at least this share of the likeliest one's probability are drawn.
        min_chars: Rows with fewer characters are dropped (empty rows always are); the paper drops documents up to 50.
    """

    temperature: Temperature = 0.8
    max_tokens: Positive
    top_k: Count = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    min_chars: Count = 0


class EvaluateSettings(Table):
    """How each model is measured.

    Attributes:
        questions: How many of the trait's questions (SDF: of its evaluation prefixes), in file order.
        samples: Answers a question.
        temperature: Softmax temperature.
        max_tokens: Tokens an answer at most.
        trait_threshold, coherence_threshold: An answer counts in the rate when both scores reach these (1-100).
        system: Contexts that every question is asked in: "none" (no system message, as in training), "empty" (one without a
            word), or the system message itself. The first one's scores are the curve.
    """

    questions: Positive = 12
    samples: Positive = 20
    temperature: Temperature = 0.7
    max_tokens: Positive = 400
    trait_threshold: Annotated[float, Field(ge=1, le=100)] = 50.0
    coherence_threshold: Annotated[float, Field(ge=1, le=100)] = 50.0
    system: tuple[str, ...] = (contexts.NONE,)


class MixSettings(Table):
    """Rows mixed into D[t] from cycle 1 on.

    Attributes:
        source: The trait's seed rows, rows that the untouched model writes, or a file of the user's own.
        share: Share of the cycle's training rows that come from there.
        path: The file or dataset for "file".
        split: Split of a hub dataset.
        prompt: Column that holds the prompt of a chat.
        reply: Column that holds the reply of a chat.
        text: Column that holds a document.
    """

    source: Literal["none", "seed", "base", "file"] = "none"
    share: Share = 0.0
    path: str | None = None
    split: str = "train"
    prompt: str = "prompt"
    reply: str = "reply"
    text: str = "text"


class FilterSettings(Table):
    """Which generated rows are kept.

    Attributes:
        coherence: Rows whose coherence the judge puts below this are dropped; 0 asks no judge.
        dedupe: "exact" drops rows whose text was written before in the cycle.
    """

    coherence: Annotated[float, Field(ge=0, le=100)] = 0.0
    dedupe: Literal["none", "exact"] = "none"


class Source(Table):
    """A dataset of the user's own: seeds, prompts or documents.

    Attributes:
        path: JSONL, JSON, Parquet or CSV file, or the name of a dataset on the hub.
        split: Split of a hub dataset.
        prompt: Column that holds the prompt of a chat.
        reply: Column that holds the reply of a chat.
        text: Column that holds a document.
    """

    path: str
    split: str = "train"
    prompt: str = "prompt"
    reply: str = "reply"
    text: str = "text"


def _alternatives_of(names: Iterable[str]) -> str:
    """`'sft', 'sdf' or 'dpo'`."""
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last


def _known(name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise PydanticCustomError("unknown", "{known}", {"known": f"input should be {_alternatives_of(names)}"})
    return name


def _known_regime(name: str) -> str:
    return _known(name, REGIMES)


def _known_loss(name: str) -> str:
    return _known(name, LOSSES) if name else name


class Recipe(Table):
    """One experiment.

    Attributes:
        name: What the run is called; the file's stem unless given.
        regime: SFT (chats), SDF (documents) or DPO (pairs).
        trait: A shipped trait, or a path to a trait folder.
        model: `nano`, `nano-base`, a local Hugging Face folder, or a hub name, with or without `@COMMIT`.
        seed: The random seed; every row's own seed derives from it.
        cycles: Cycles after the seeded one: the last is the paper's cycle of this number.
        seed_rows: Rows of the trait that cycle 0 is trained on (M1); 0 is the no-seed control: M1 is M0, the untouched model.
        rows: Rows that each later model is trained on.
        seeds, prompts: Datasets of the user's own in place of the trait's rows and the shipped prompts.
        loss: The loss that is trained with; the regime's own unless given.
        start: The model that each training starts from: the untouched one, or that of the cycle before. The regime's own
            unless given.
        reference: DPO's reference model: the one the cycle starts from, or the untouched one.
        chosen: DPO's preferred side: the newest model's own answer, the seed reply, or the best of `candidates` by the judge.
        rejected: DPO's other side: the answer of the untouched model, of the model before, the newest model's own, or the
            worst of `candidates`.
        candidates: Answers a prompt that "best" and "worst" choose from.
        pairs: Sides as chosen and rejected, or from cycle 1 on shuffled: a control in which no side is preferred.
        writer: Who writes a cycle's data: the newest model, or in every cycle the untouched one: a control without
            feedback.
        data: What a cycle trains on: its own data alone, with all before it, or a fixed-size draw from all.
        slices: Each cycle asks its own prompts, or all draw from the same ones.
        reset_cycles: Cycles of a continual run that start from the untouched model again.
        mix, filter: See there.
        trainer: "auto" takes unsloth where it works and peft elsewhere; "trl" is peft with TRL's loop, for comparison; "fake"
            learns texts by heart, for trying a recipe's shape.
        generator: What writes: llama.cpp, or a fake beside a fake trainer.
        export: One merged GGUF a cycle; or the untouched model's GGUF with a small LoRA GGUF a cycle; "auto": merged where that
            carries the trained change, which the export's check finds out, and the LoRA GGUF where it does not.
        quant: Number format of the GGUF that writes and is measured.
        keep: What stays of the models once their cycle is done: all; the newest merged file and all adapters; adapters alone;
            or, with "ends", the adapters of cycle 0 and of the last cycle, for studies of many cells.
        judge: "auto" is the paper's judge (after its end a successor) where a key is present, else the untouched model where it
            is an instruct model of 1 B parameters or more, else the embedded judge.
        judge_fit: Where the judge is the embedded one: fitted on the texts without the trait that ship, or with "own" also on
            what the untouched model answers to everyday prompts, one more step of the run; "auto": on these where no answers of
            this model ship.
        judge_method: Scores from token probabilities, or from `judge_samples` texts; "auto": probabilities where the judge is
            known to give them.
        judge_samples: Verdicts an answer and scale where a judge gives no probabilities.
        judge_batch: Verdicts are asked in batches, at half the price and within a day each (`openai/...` judges only).
        api_base: Address of an OpenAI-compatible server.
        max_usd: Judging stops before it would cost more; 0 means no limit.
        slots: Sequences decoded at once; 1 makes runs bit-equal. Not part of any step's key, as all below.
        vram: Trainer and generator share the GPU, take turns, or as free VRAM decides.
        threads: CPU threads; "auto" is the number of cores.
        track: Experiment trackers that the run's numbers are sent to; each needs the extra of its name.
    """

    name: str = ""
    regime: Annotated[str, AfterValidator(_known_regime)]
    trait: str
    model: str
    seed: Annotated[int, Field(ge=0, strict=True), _at_most(2**63 - 1)] = 42
    cycles: Annotated[int, Field(ge=0, le=1000, strict=True)] = 6
    seed_rows: Count = 50
    rows: Positive = 50
    seeds: Source | None = None
    prompts: Source | None = None
    loss: Annotated[str, AfterValidator(_known_loss)] = ""
    start: Start
    reference: Literal["start", "base"] = "start"
    chosen: Literal["own", "seed", "best"] = "own"
    rejected: Literal["base", "previous", "own", "worst"] = "base"
    candidates: Annotated[int, Field(ge=2, le=1000, strict=True)] = 4
    pairs: Literal["preferred", "shuffled"] = "preferred"
    writer: Literal["previous", "base"] = "previous"
    data: Literal["replace", "accumulate", "accumulate_subsample"] = "replace"
    slices: Literal["disjoint", "resample"] = "disjoint"
    reset_cycles: tuple[Positive, ...] = ()
    trainer: Literal["auto", "peft", "trl", "unsloth", "fake"] = "auto"
    generator: Literal["llamacpp", "fake"] = "llamacpp"
    export: Literal["auto", "merged", "adapter"] = "auto"
    quant: Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"] = "q8_0"
    keep: Keep = "last"
    judge: str = "auto"
    judge_fit: Literal["auto", "own", "shipped"] = "auto"
    judge_method: Literal["auto", "logprobs", "samples"] = "auto"
    judge_samples: Positive = 5
    judge_batch: bool = False
    api_base: str | None = None
    max_usd: Annotated[float, Field(ge=0)] = 0.0
    slots: Positive | Literal["auto"] = "auto"
    vram: Literal["auto", "resident", "swap"] = "auto"
    threads: Positive | Literal["auto"] = "auto"
    track: tuple[TrackerName, ...] = ()
    mix: MixSettings = MixSettings()
    filter: FilterSettings = FilterSettings()
    train: TrainSettings
    sample: SampleSettings
    evaluate: EvaluateSettings = EvaluateSettings()

    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the recipe was read, a sentence each."""
        return self._notes

    @property
    def row(self) -> Regime:
        """The recipe's row of the table of regimes."""
        return REGIMES[self.regime]

    @property
    def loss_record(self) -> Loss:
        """What is known of the loss."""
        return LOSSES[self.loss or self.row.loss]

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


ALIASES: Mapping[str, str] = {"restart": "reset_cycles"}
"""Keys as earlier versions called them."""

VALUE_ALIASES: Mapping[tuple[str, str], str] = {("judge_method", "odds"): "logprobs"}
"""Values as earlier versions called them, by key."""

MACHINE_KEYS = frozenset({"name", "slots", "vram", "threads", "keep", "cycles", "max_usd", "judge_batch", "track"})
"""Keys that a run may be continued with another value of: they change no finished step."""


def _contradictions(recipe: Recipe) -> Iterable[str]:
    """Settings that do not go together, a sentence each."""
    loss = recipe.loss_record
    if loss.continues != (recipe.row.rows == "document"):
        yield f'`loss = "{loss.name}"` is {loss.words}, and {recipe.regime} writes {recipe.row.rows}s'
    if not loss.compares:
        for key, value, usual in (
            ("chosen", recipe.chosen, "own"),
            ("rejected", recipe.rejected, "base"),
            ("reference", recipe.reference, "start"),
            ("pairs", recipe.pairs, "preferred"),
        ):
            if value != usual:
                yield f'`{key} = "{value}"` needs `regime = "dpo"`: {recipe.regime} has no pairs'
    elif recipe.chosen == "own" and recipe.rejected == "own":
        yield '`chosen = "own"` and `rejected = "own"` are the same answer: choose another side'
    elif recipe.writer == "base" and recipe.chosen == "seed" and recipe.rejected in ("base", "previous"):
        yield f'`writer = "base"` has nothing to write: `chosen = "seed"`, and `rejected = "{recipe.rejected}"` is not its own'
    if (recipe.mix.source == "none") != (recipe.mix.share == 0.0):
        yield "`mix` needs both a `source` and a `share` above 0"
    elif recipe.mix.share and not round(recipe.mix.share * recipe.rows):
        yield f"`mix.share = {recipe.mix.share:g}` of `rows = {recipe.rows}` comes to no row"
    if (recipe.mix.source == "file") != (recipe.mix.path is not None):
        yield '`mix.path` goes with `mix.source = "file"`, and only with it'
    if recipe.mix.source != "none" and recipe.loss_record.compares:
        yield "`mix` is for sft and sdf: a mixed-in row has no rejected side"
    if (recipe.trainer == "fake") != (recipe.generator == "fake"):
        yield '`trainer = "fake"` and `generator = "fake"` go together: a fake model is only read by a fake generator'
    if recipe.reset_cycles and recipe.start != "previous":
        yield '`reset_cycles` needs `start = "previous"`: every cycle starts from the base already'
    yield from contexts.faults(recipe.evaluate.system, chats=recipe.row.rows == "chat")
    yield from _too_much(recipe)
    if "@" in (recipe.api_base or ""):
        yield "`api_base` holds a user or a password, which would be written into the run: put the key into the environment"


def _too_much(recipe: Recipe) -> Iterable[str]:
    """What no machine could do."""
    sides = recipe.candidates if {recipe.chosen, recipe.rejected} & {"best", "worst"} else 1
    written = recipe.cycles * recipe.rows * sides
    evaluate = recipe.evaluate
    asked = (recipe.cycles + 2) * evaluate.questions * evaluate.samples * len(evaluate.system)
    for what, many in (("rows to write", written), ("answers to judge", asked)):
        if many > MOST_ANSWERS:
            yield f"that is {many:,} {what}, all cycles together: at most {MOST_ANSWERS:,}"


def read_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `key=value` overrides laid over it.

    Args:
        path: The TOML file.
        overrides: `key=value` or `table.key=value`; the value is TOML, or else taken as text.

    Raises:
        RecipeError: With every problem at once.
    """
    asked = list(overrides)
    source = " ".join([str(path), *(f"--set {text}" for text in asked)])
    return make_recipe({"name": path.stem, **read_keys(path, asked)}, source=source)


def read_keys(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a recipe's file says, with overrides laid over it; nothing is checked yet.

    Args:
        path, overrides: As of `read_recipe`.

    Raises:
        RecipeError: If the file is no TOML, or an override no `key=value`.
    """
    source = str(path)
    try:
        given = tomllib.loads(read_user_text(path, limit=LIMIT).text)
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(
            [f"there is no file `{path}`"], source=source, hint="`iterft recipes` lists the shipped ones"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([f"is not TOML: {error}"], source=source) from None
    except RecursionError:
        raise RecipeError(["cannot be read: it is nested too deeply"], source=source) from None
    except ValueError as error:  # no text, or a number of thousands of digits
        raise RecipeError([f"cannot be read: {getattr(error, 'message', error)}"], source=source) from None
    if {"base", "sweep"} <= given.keys():
        raise RecipeError(["is a study, not a recipe"], source=source, hint=f"`iterft sweep plan {path}` plans it")
    return with_overrides(given, overrides)


def with_overrides(given: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A recipe's keys with `key=value` texts laid over them.

    Raises:
        RecipeError: With every problem at once.
    """
    found = copy.deepcopy(dict(given))
    problems = [problem for text in overrides if (problem := _override(found, text))]
    if problems:
        raise RecipeError(problems, source="--set", hint="write `--set key=value` or `--set table.key=value`")
    return found


def with_values(given: Mapping[str, Any], values: Mapping[str, Json]) -> dict[str, Any]:
    """A recipe's keys with values laid over them.

    Args:
        values: By key with its table: `train.learning_rate`.

    Raises:
        RecipeError: If a key is set inside of something that is not a table.
    """
    found = copy.deepcopy(dict(given))
    problems = [problem for key, value in values.items() if (problem := _lay(found, key, value))]
    if problems:
        raise RecipeError(problems, source=str(given.get("name", "recipe")))
    return found


def make_recipe(given: Mapping[str, Any], *, source: str) -> Recipe:
    """The recipe that a mapping describes, the regime's settings filled in.

    Raises:
        RecipeError: With every problem at once.
    """
    if not isinstance(given, Mapping):
        raise RecipeError(["is not a table of keys"], source=source)
    given, notes = _renamed(given)
    filled = _filled(given)
    try:
        made = Recipe.model_validate(filled)
        made._notes = notes
        return made
    except ValidationError as error:
        problems = list(_problems(error, known_regime=str(given.get("regime")) in REGIMES))
        raise RecipeError(problems + _hidden(filled, error), source=source) from None


def _renamed(given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What was given in today's words, and a note for each word that was another."""
    found, notes = dict(given), []
    for old, new in ALIASES.items():
        if old in found and new not in found:
            found[new] = found.pop(old)
            notes.append(f"`{old}` is now `{new}`")
    for (key, before), after in VALUE_ALIASES.items():
        if found.get(key) == before:
            found[key] = after
            notes.append(f'`{key} = "{before}"` is now `"{after}"`')
    return found, tuple(notes)


def _filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, with the regime's settings where it is silent."""
    regime = {str(name): row for name, row in REGIMES.items()}.get(str(given.get("regime")))
    filled: dict[str, Any] = dict(given)
    if regime is not None:
        filled.setdefault("start", regime.start)
        for table, settings in regime.settings.items():
            if isinstance(given.get(table, {}), Mapping):
                filled[table] = {**settings, **given.get(table, {})}
    return filled


def _hidden(filled: Mapping[str, Any], error: ValidationError) -> list[str]:
    """The contradictions that pydantic did not come to because single keys are wrong: those keys are left out."""
    places = [item["loc"] for item in error.errors()]
    if () in places:
        return []
    kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in filled.items()}
    for table, *rest in places:
        if rest and isinstance(kept.get(str(table)), dict):
            kept[str(table)].pop(rest[0], None)
        else:
            kept.pop(str(table), None)
    try:
        Recipe.model_validate(_filled(kept))
    except ValidationError as again:
        return [line for item in again.errors() if not item["loc"] for line in _of_the_whole(item)]
    return []


def _problems(error: ValidationError, *, known_regime: bool) -> Iterable[str]:
    """What pydantic found, in the words of this project, one sentence a place."""
    told = set()
    for item in error.errors():
        place = ".".join(part if isinstance(part, str) else str(part + 1) for part in _place(item["loc"]))
        if place and place in told:
            continue
        told.add(place)
        if item["type"] == "extra_forbidden" and not place:  # a key that is no name: "train.epochs", "my key"
            yield _odd_key(str(item["loc"][-1]))
        elif item["type"] == "extra_forbidden":
            near = near_key(place, key_names(Recipe))
            yield f"`{place}` is not a recipe key" + (f", did you mean `{near}`?" if near else "; `iterft keys` lists them")
        elif item["type"] == "model_type":
            yield f"`{place} = {_shown(item['input'])}`: a table is needed, `[{place}]`"
        elif union := _alternatives(error, item["loc"]):
            yield f"`{place} = {_shown(item['input'])}`: {union}"
        elif item["type"] == "missing":
            # without a regime nothing else can be filled in: one cause, one problem
            if known_regime or item["loc"] in (("regime",), ("trait",), ("model",)):
                yield f"`{place}` is missing"
        elif not item["loc"]:
            yield from _of_the_whole(item)
        else:
            message = item["msg"].replace("a valid tuple", "a list")
            yield f"`{place} = {_shown(item['input'])}`: {message[0].lower()}{message[1:]}"


def _of_the_whole(item: Mapping[str, Any]) -> list[str]:
    """What is wrong with a recipe as a whole: a contradiction, or a key that is no text (half of a surrogate pair)."""
    if item["type"] == "string_unicode":
        return [f"the key {_shown(item['input'])} is not Unicode text"]
    return str(item.get("ctx", {}).get("error", item["msg"])).splitlines()


def _shown(value: Any) -> str:
    """A value as it was given, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of about {value.bit_length() * 3 // 10} digits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _odd_key(name: str) -> str:
    """What is wrong with a key in quotes; dots in it are no tables in TOML."""
    table, _, key = name.partition(".")
    if key and name in key_names(Recipe):
        return f'`"{name}"` is one name in quotes: write `{table}.{key}` without them, or `{key}` below `[{table}]`'
    return f"`{_shown(name)}` is not a recipe key; `iterft keys` lists them"


def _place(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Where in a recipe, without the names that pydantic gives to the members of a union."""
    return tuple(part for part in loc if isinstance(part, int) or part.isidentifier())


def _alternatives(error: ValidationError, loc: tuple[int | str, ...]) -> str:
    """What every member of a union asks for, joined; "" where there is no union."""
    if _place(loc) == loc:
        return ""
    asked = [item["msg"] for item in error.errors() if _place(item["loc"]) == _place(loc)]
    return "input should be " + " or ".join(message.removeprefix("Input should be ") for message in asked)


def _override(given: dict[str, Any], text: str) -> str | None:
    """Lay one `key=value` over a recipe's mapping; a sentence if that cannot be done."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        return f"`{text}` has no `key=value`"
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    except (ValueError, RecursionError) as error:
        return f"`{text[:SHOWN]}`: {error}"
    return _lay(given, name.strip(), parsed)


def _lay(given: dict[str, Any], place: str, value: Any) -> str | None:
    """Set one key of a recipe's mapping; a sentence if that cannot be done."""
    *tables, key = place.split(".")
    for table in tables:
        given = given.setdefault(table, {})
        if not isinstance(given, dict):
            return f"`{table}` in `{place}` is not a table"
    given[key] = value
    return None
