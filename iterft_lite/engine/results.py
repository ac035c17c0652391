"""What each verb's results are read as: a completion record may come from a stranger, and its checksum with it.

Every value that a report, a chart or a sweep computes with is of its kind here, and a score in [1, 100].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from iterft_lite.digests import Json
from iterft_lite.errors import StoreError

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Score = Annotated[float, Field(ge=1, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Measured = float | None
"""A number that may be anything, infinite too: of a training, or of texts."""


class _Results(BaseModel):
    """A verb's results; what is not named here nothing computes with."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Loaded(_Results):
    parameters: Count = 0


class _Dataset(_Results):
    rows: Count
    dropped: dict[str, Count] = {}


class _Samples(_Results):
    rows: Count
    tokens: Count = 0
    cut: Count = 0
    tokens_per_second: Positive = 0.0


class _Train(_Results):
    rows: Count = 0
    steps: Count = 0
    tokens: Count = 0
    first_loss: Measured = None
    last_loss: Measured = None
    partial_batch: Count = 0
    cut_rows: Count = 0
    margin: Measured = None
    accuracy: Measured = None
    precision: str = ""
    peak_vram: Count = 0
    notes: list[str] = []


class _Change(_Results):
    kept: Measured = None
    error: Measured = None


class _Parity(_Results):
    max_delta: Measured = None
    mean_kl: Measured = None
    top1: Measured = None
    change: _Change | None = None


class _Export(_Results):
    kind: str = ""
    bytes: Count = 0
    parity: _Parity | None = None
    notes: list[str] = []


class _Judge(_Results):
    answers: Count = 0
    calls: Count
    cached: Count
    usd: Positive


class _Scale(_Results):
    mean: Score | None
    low: Number | None = None
    high: Number | None = None
    prompts: Count = 0
    scored: Count = 0
    unscored: Count = 0
    reasons: dict[str, Count] = {}
    by_prompt: dict[str, list[Score]]


class _Aggregate(_Results):
    trait: _Scale | None
    coherence: _Scale | None
    answers: Count = 0
    rate: Share | None = None


KINDS: Mapping[str, TypeAdapter[Any]] = {
    "load_base": TypeAdapter(_Loaded),
    "build_dataset": TypeAdapter(_Dataset),
    "training_samples": TypeAdapter(_Samples),
    "evaluate_samples": TypeAdapter(_Samples),
    "train": TypeAdapter(_Train),
    "export": TypeAdapter(_Export),
    "judge": TypeAdapter(_Judge),
    "aggregate": TypeAdapter(_Aggregate),
    "text_metrics": TypeAdapter(dict[str, Measured]),
}
"""By verb."""


def refuse_strange(path: Path, verb: str, results: Mapping[str, Json]) -> None:
    """Refuse results in which a value is missing or of another kind.

    Args:
        path: Of the record that they stand in.

    Raises:
        StoreError: With the first of them.
    """
    try:
        if verb in KINDS:
            KINDS[verb].validate_python(dict(results), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise StoreError(f"`{path}` does not hold what a step `{verb}` comes to: {what}") from None
