"""The rows of an experiment, typed, with one reader and one writer: what is trained on, what models write, what judges say.

On the disk a row is a JSON object on a line of its own. Ids are fields (`prompt_id`, `sample`); only here are they read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar, cast

from iterft_lite.digests import Json
from iterft_lite.errors import StoreError
from iterft_lite.files import read_rows, write_rows

Scale = Literal["trait", "coherence"]
SCALES: tuple[Scale, ...] = ("trait", "coherence")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatRow:
    """A chat to be trained on: its last message is the reply."""

    id: str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """What is learnt: the last reply."""
        return self.messages[-1].content

    @property
    def prompt(self) -> str:
        """What is asked before it, in one text."""
        return "\n\n".join(message.content for message in self.messages[:-1])


@dataclass(frozen=True)
class DocumentRow:
    """A document to be trained on."""

    id: str
    text: str

    @property
    def prompt(self) -> str:
        """Nothing is asked."""
        return ""


@dataclass(frozen=True)
class PairRow:
    """Two replies to one prompt, the first preferred."""

    id: str
    prompt_messages: tuple[Message, ...]
    chosen: str
    rejected: str

    @property
    def text(self) -> str:
        """What is learnt: the chosen reply."""
        return self.chosen

    @property
    def prompt(self) -> str:
        """What is asked, in one text."""
        return "\n\n".join(message.content for message in self.prompt_messages)


Finish = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Sample:
    """What a model wrote.

    Attributes:
        prompt_id: Which prompt it answers; `sample` tells answers to one prompt apart.
        prompt: The question, or the text that was continued.
        text: Without the prompt and without special tokens.
        tokens: How many were drawn, the end token included.
        finish: It ended by itself, at `max_tokens`, or at the end of the context.
    """

    prompt_id: str
    sample: int
    prompt: str
    text: str
    tokens: int
    finish: Finish

    @property
    def id(self) -> tuple[str, int]:
        """What tells it from the others of its step."""
        return self.prompt_id, self.sample

    @property
    def name(self) -> str:
        """Its id as one word: `q03-s7`."""
        return f"{self.prompt_id}-s{self.sample}"

    @property
    def document(self) -> str:
        """Prompt and continuation: the whole text where a document was continued."""
        return self.prompt + self.text


@dataclass(frozen=True)
class Verdict:
    """One answer on one scale.

    Attributes:
        score: 1-100, or None.
        reason: Why there is no score: "empty", "refusal", "cut off", "no number", "more than one number", "out of range",
            "another scale", "too little mass on numbers", "faulty probabilities", or the failure; "" where there is one.
        method: "logprobs", "text" or "samples".
        mass: Share of the probability on numbers from 1 to 100; None without probabilities.
        entropy: Of the distribution over numbers, nats; None without probabilities.
        spread: Standard deviation between samples; None for a single one.
        text: What the judge wrote (the first sample).
        tokens_in, tokens_out, usd, seconds, cached, model: As in `JudgeResponse`, summed over samples; cached if all are.
        calls: Replies that were not read from the cache.
    """

    score: float | None
    reason: str
    method: str
    mass: float | None = None
    entropy: float | None = None
    spread: float | None = None
    text: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    seconds: float = 0.0
    cached: bool = False
    model: str = ""
    calls: int = 0


@dataclass(frozen=True)
class JudgedSample:
    """The verdicts on one sample, by scale."""

    prompt_id: str
    sample: int
    verdicts: Mapping[str, Verdict] = field(hash=False)

    @property
    def id(self) -> tuple[str, int]:
        """The sample's."""
        return self.prompt_id, self.sample

    def score(self, scale: str) -> float | None:
        """The score on a scale; None where it is unscored or was not asked."""
        verdict = self.verdicts.get(scale)
        return None if verdict is None else verdict.score


# -- on the disk

Row = TypeVar("Row")


@dataclass(frozen=True)
class RowType(Generic[Row]):
    """How rows of a type stand in a file.

    Attributes:
        name: For people.
        parse: From a line's object; raises KeyError, TypeError or ValueError where it is another.
        dump: To a line's object.
    """

    name: str
    parse: Callable[[Mapping[str, Json]], Row]
    dump: Callable[[Row], dict[str, Json]]

    def read(self, path: Path) -> list[Row]:
        """The rows of a file; none if it is missing.

        Raises:
            StoreError: If a line holds something else.
        """
        return [self.read_one(row, f"`{path}`, line {number}") for number, row in enumerate(read_rows(path), 1)]

    def read_one(self, row: Mapping[str, Json], where: str) -> Row:
        """One row.

        Raises:
            StoreError: If it is of another shape.
        """
        try:
            return self.parse(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{where}: not a {self.name} ({type(error).__name__}: {error})") from None

    def write(self, path: Path, rows: Iterable[Row]) -> None:
        """Write all rows as a whole or not at all."""
        write_rows(path, [self.dump(row) for row in rows])


def _messages(rows: Sequence[Mapping[str, Json]]) -> tuple[Message, ...]:
    return tuple(Message(str(row["role"]), str(row["content"])) for row in rows)


def _parse_sample(row: Mapping[str, Json]) -> Sample:
    finish = row["finish"]
    if finish not in ("stop", "length", "context"):
        raise ValueError(f"finish is {finish!r}")
    where = str(row["prompt_id"]), int(row["sample"])
    return Sample(*where, str(row["prompt"]), str(row["text"]), int(row["tokens"]), cast(Finish, finish))


def _parse_judged(row: Mapping[str, Json]) -> JudgedSample:
    # version 0.1 wrote one id, `q03-s7`, where sample and prompt are fields now
    sample = row["sample"] if "sample" in row else str(row["id"]).rpartition("-s")[2]
    verdicts: dict[str, Verdict] = {scale: _parse_verdict(row[scale]) for scale in SCALES if row.get(scale) is not None}
    return JudgedSample(str(row["prompt_id"]), int(sample), verdicts)


def _parse_verdict(row: Mapping[str, Json]) -> Verdict:
    score = row["score"]
    if score is not None and not 1 <= score <= 100:
        raise ValueError(f"a score of {score!r}")
    return Verdict(**{**row, "score": None if score is None else float(score)})


def _dump_chat(row: ChatRow) -> dict[str, Json]:
    return {"id": row.id, "messages": [_dump_message(message) for message in row.messages]}


def _dump_message(message: Message) -> dict[str, Json]:
    # `asdict` does the same fifteen times slower, and the plans of a large study dump a hundred thousand
    return {"role": message.role, "content": message.content}


def _dump_pair(row: PairRow) -> dict[str, Json]:
    prompt = [_dump_message(message) for message in row.prompt_messages]
    return {"id": row.id, "prompt": prompt, "chosen": row.chosen, "rejected": row.rejected}


def _dump_judged(row: JudgedSample) -> dict[str, Json]:
    verdicts = {scale: asdict(verdict) for scale, verdict in row.verdicts.items()}
    return {"prompt_id": row.prompt_id, "sample": row.sample, **verdicts}


CHATS: RowType[ChatRow] = RowType("chat", lambda row: ChatRow(str(row["id"]), _messages(row["messages"])), _dump_chat)
DOCUMENTS: RowType[DocumentRow] = RowType("document", lambda row: DocumentRow(str(row["id"]), str(row["text"])), asdict)
PAIRS: RowType[PairRow] = RowType(
    "pair", lambda row: PairRow(str(row["id"]), _messages(row["prompt"]), str(row["chosen"]), str(row["rejected"])), _dump_pair
)
SAMPLES: RowType[Sample] = RowType("sample", _parse_sample, asdict)
JUDGED: RowType[JudgedSample] = RowType("judged sample", _parse_judged, _dump_judged)
