"""load_base: load M[0], note its facts and what its export must reproduce."""

from __future__ import annotations

from dataclasses import asdict

from iterft_lite.digests import Json
from iterft_lite.errors import ModelError
from iterft_lite.protocols import Progress
from iterft_lite.stages.work import Work


def run(work: Work) -> dict[str, Json]:
    """Files: probe.npz. Results: the model's facts (`ModelFacts`).

    Raises:
        ModelError: If the regime needs a chat template and the model has none.
    """
    trainer, model = work.backends.trainer, work.model()
    work.report(Progress(0, 2, "parts"))
    facts = trainer.load(model, work.recipe.train)
    if not work.recipe.loss_record.continues and not facts.chat:
        raise ModelError(f"`{model}` has no chat template", hint='use an instruct model, or `regime = "sdf"`')
    work.report(Progress(1, 2, "parts"))
    trainer.probe(work.folder)
    work.report(Progress(2, 2, "parts"))
    return asdict(facts)
