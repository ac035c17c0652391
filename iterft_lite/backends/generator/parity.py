"""How an exported model compares with the trained one: its logits, and the change that training made to them.

Logits alone cannot tell a trained model from the untouched one where the training moved them less than the number format does:
in q8_0 every model is some 0.01 nats away from itself. But the untouched model in the same format is away in the same way, and
the difference of the two is the change that the export shows:

    trained[p] = logits of M[t] - logits of M[0]                  at position p, in 32 bits, from the trainer
    shown[p]   = logits of Q[t] - logits of the untouched export  at the same position, from llama.cpp
    kept       = sum <shown, trained> / sum <trained, trained>    the slope through zero: 1 where the change is there

Logits mean the same with any number added to a whole row, so each row of a change is taken without its mean. What rounding adds
to the logits hangs together: over the vocabulary, and over positions, which all look back at the same first tokens. So the
standard error of `kept` is noise / sqrt(4 texts), each text counting as four observations: where the answer was known (adapters
over a base, stochastic rounding), the errors made were 0.17 of the noise in the mean and 0.32 at most, with seven texts. An
error estimated from how single positions differ was up to seven times too small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from iterft_lite.backends.llamacpp.sampling import Floats, log_softmax
from iterft_lite.errors import ModelError
from iterft_lite.protocols import Change, Parity

PER_TEXT = 4
"""Independent observations of a number format's noise that a text counts as."""

Doubles = npt.NDArray[np.float64]


class Probe:
    """A probe as read: see `Trainer.probe`.

    Args:
        path: A folder with probe.npz, or that file.

    Raises:
        ModelError: If it cannot be read, or asks for nothing.
    """

    def __init__(self, path: Path) -> None:
        path = path / "probe.npz" if path.is_dir() else path
        try:
            with np.load(path, allow_pickle=False) as arrays:
                tokens, lengths, where = arrays["tokens"], arrays["lengths"], arrays["where"]
                self.logits: Floats = arrays["logits"].astype(np.float32)
                self.texts = [str(text) for text in arrays["texts"]]
                known = [arrays[name] for name in ("base_logits", "columns", "learned") if name in arrays]
                self.before = Before(*known) if known else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"the probe `{path}` cannot be read: {error}") from None
        if not len(where):
            raise ModelError(f"`{path}` asks for no position")
        self.sequences: list[list[int]] = [row[:length].tolist() for row, length in zip(tokens, lengths.tolist(), strict=True)]
        # for each sequence: position -> row of the logits
        self.places: list[dict[int, int]] = [{} for _ in self.sequences]
        for row, (sequence, position) in enumerate(where.tolist()):
            self.places[sequence][position] = row

    @property
    def first(self) -> list[int]:
        """For each sequence, the first position that is asked for; its length where none is."""
        return [min(places, default=len(sequence)) for sequence, places in zip(self.sequences, self.places, strict=True)]


@dataclass(frozen=True)
class Before:
    """What the untouched model says at a trained model's positions.

    Attributes:
        logits: float32 [n_positions, n_columns].
        columns: Which tokens' logits those are, int32 [n_columns].
        learned: KL(M[t] || M[0]) at each position, nats, float32 [n_positions].
    """

    logits: Floats
    columns: npt.NDArray[np.int32]
    learned: Floats


def untouched_logits(path: Path) -> Floats:
    """What `Generator.probe_logits` wrote.

    Raises:
        ModelError: If it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays["logits"], dtype=np.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the untouched model's logits in `{path}` cannot be read: {error}") from None


def compare(asked: Probe, ours: Floats, untouched: Floats | None, detail: str, *, rounded: bool) -> Parity:
    """Compare an exported model with a probe.

    Args:
        asked: The trained model's.
        ours: The exported model's logits at its positions, float32 [n_positions, vocab]; vocab may be smaller than the probe's.
        untouched: The untouched model's, exported in the same format; None: changes are not compared.
        detail: The first difference in tokens, as a sentence, or "".
        rounded: Whether llama.cpp rounds this architecture's activation functions to 16 bits here.
    """
    theirs = asked.logits[:, : ours.shape[1]]
    differences = np.abs(theirs - ours).max(axis=1)
    # KL(trained || exported) at each position, in the direction in which what the trained model would say is missed
    log_p, log_q = log_softmax(theirs), log_softmax(ours)
    divergences = (np.exp(log_p) * (log_p - log_q)).sum(axis=1, dtype=np.float64)
    numbers = bool(np.isfinite(differences).all() and np.isfinite(divergences).all())
    return Parity(
        same_tokens=not detail,
        max_delta=float(differences.max()) if numbers else math.inf,
        mean_kl=max(0.0, float(divergences.mean())) if numbers else math.inf,
        top1=float((theirs.argmax(axis=1) == ours.argmax(axis=1)).mean()),
        positions=len(ours),
        detail=detail,
        largest=float(np.abs(theirs).max()) if numbers else math.inf,
        rounded=rounded,
        change=None
        if asked.before is None or untouched is None or not numbers
        else change(asked.before, theirs, ours, untouched, texts=len(asked.texts)),
    )


def change(before: Before, theirs: Floats, ours: Floats, untouched: Floats, *, texts: int) -> Change:
    """Hold the change that an export shows against the one that was trained (the equations are at the head of this file).

    Args:
        before: The untouched model in 32 bits.
        theirs: The trained model in 32 bits, float32 [n_positions, vocab].
        ours, untouched: The exported model and the untouched one in its format, alike.
        texts: From which the positions are.
    """
    inside = before.columns < ours.shape[1]
    columns = before.columns[inside]
    trained = _centred(theirs[:, columns] - before.logits[:, inside])
    shown = _centred(ours[:, columns] - untouched[:, columns])
    size, seen = _rms(trained), _rms(shown)
    same = {
        "learned": max(0.0, float(before.learned.mean(dtype=np.float64))),
        "size": size,
        "scale": _rms(_centred(theirs[:, columns])),
        "shown": seen,
    }
    if not size:
        return Change(**same, kept=None, error=None, correlation=None, noise=None)
    # the regression of what the export shows on what was trained: 1 where the change is whole, 0 where it is lost; what is left
    # over is the noise of the number format
    kept = float((trained * shown).mean()) / size**2
    noise = _rms(shown - kept * trained) / size
    return Change(
        **same,
        kept=kept,
        error=noise / math.sqrt(PER_TEXT * texts),
        correlation=kept * size / seen if seen else 0.0,
        noise=noise,
    )


def _centred(rows: Floats) -> Doubles:
    """Rows without their mean, in 64 bits."""
    made: Doubles = rows.astype(np.float64)
    # a constant added to all logits of a position changes no probability: it is no part of a change
    made -= made.mean(axis=1, keepdims=True)
    return made


def _rms(values: Doubles) -> float:
    return float(np.sqrt((values**2).mean()))


def token_difference(place: int, readings: Sequence[tuple[str, Sequence[int]]], theirs: Sequence[int]) -> str:
    """The first reading of a text that differs from the trainer's, as a sentence, or "".

    Args:
        place: Of the text in the probe.
        readings: Whose it is, and its token ids.
        theirs: The trainer's token ids.
    """
    for whose, ours in readings:
        if list(ours) != list(theirs):
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            return (
                f"text {place} of the probe: {whose} token {at} is {list(ours[at : at + 1]) or 'missing'}, "
                f"the trainer's is {list(theirs[at : at + 1]) or 'missing'}"
            )
    return ""
