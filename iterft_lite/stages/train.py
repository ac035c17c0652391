"""train: M[t + 1], an adapter on M[0], from D[t]."""

from __future__ import annotations

from dataclasses import asdict

from iterft_lite.digests import Json
from iterft_lite.experiment.recipe import TrainSettings
from iterft_lite.experiment.steps import row_seed
from iterft_lite.files import ROWS
from iterft_lite.protocols import TrainJob
from iterft_lite.stages.work import Work


def run(work: Work) -> dict[str, Json]:
    """Files: adapter/, log.jsonl, probe.npz. Results: the trainer's (`TrainResult`)."""
    trainer = work.backends.trainer
    settings = TrainSettings(**work.params["settings"])
    trainer.load(work.model(), settings)
    start = work.inputs.get("start")
    job = TrainJob(
        rows=work.inputs["rows"] / ROWS,
        out=work.folder,
        loss=work.params["loss"],
        settings=settings,
        seed=row_seed(work.step.key, "train"),
        start=start / "adapter" if start else None,
        reference=work.params.get("reference", "start"),
    )
    return asdict(trainer.train(job, work.report))
