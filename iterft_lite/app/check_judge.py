"""Checks the judge before the first step and in `plan`: a missing key must not show up after an hour of work."""

from __future__ import annotations

import http.client
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from iterft_lite.backends.judge.identity import has_ended, way_on
from iterft_lite.backends.judge.keys import environment, scrub
from iterft_lite.backends.judge.kinds import Material, kind_of
from iterft_lite.backends.judge.prices import successors
from iterft_lite.backends.judge.probe import Prober
from iterft_lite.backends.judge.providers import (
    STAND_IN,
    key_of,
    key_variables,
    needs_key,
    provider_of,
    proxy_for,
    unknown_provider,
)
from iterft_lite.backends.processes.child import Child
from iterft_lite.cache import cache_folder
from iterft_lite.errors import BackendError, UserError
from iterft_lite.experiment.inputs import JudgeIdentity
from iterft_lite.experiment.recipe import Recipe
from iterft_lite.machine.resolve import Resolved

PATIENCE = 10.0
"""Longest wait for a server to list its models, seconds."""

MOST_BYTES = 4 << 20
"""Of a server's list."""


@dataclass(frozen=True)
class JudgeCheck:
    """The result of a check.

    Attributes:
        identity: The judge as it will be asked. A trial may have changed the way of reading numbers.
        problems: Reasons why it cannot judge, a sentence each.
        notes: Sentences that the user should know.
    """

    identity: JudgeIdentity
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_judge(identity: JudgeIdentity, recipe: Recipe, *, live: bool = False) -> JudgeCheck:
    """Look for a judge's key, server and model. Free of charge unless `live`: then it asks a judge that is little known two
    short questions, which may change the way of reading numbers.

    Args:
        identity: The judge.
        live: A run is about to begin.
    """
    if not kind_of(identity.name).remote:
        return JudgeCheck(identity)
    problems = tuple(_problems(identity))
    little_known = identity.effort or identity.tops or not provider_of(identity.name).known
    if problems or not live or not little_known:
        return JudgeCheck(identity, problems)
    try:
        return _probed(identity, recipe)
    except BackendError as error:
        return JudgeCheck(identity, (str(error).replace("\n\nhint: ", "; "),))


def settled(resolved: Resolved, known: Mapping[str, Any] | None) -> Resolved:
    """A resolved recipe whose judge is asked as it can be: as the folder's was, or as trying it has shown.

    Args:
        known: The judge's identity in the folder's manifest; None for a new folder.

    Raises:
        UserError: If the judge cannot judge.
    """
    judge = resolved.inputs.judge
    if known is None:
        found = _first_that_judges(resolved)
    else:
        found = JudgeCheck(as_before(judge, known) if known.get("name") == judge.name else judge)
    recipe = resolved.recipe.model_copy(update={"judge": found.identity.name})
    inputs = replace(resolved.inputs, judge=found.identity)
    return replace(resolved, recipe=recipe, inputs=inputs, choices=(*resolved.choices, *found.notes))


def _first_that_judges(resolved: Resolved) -> JudgeCheck:
    """The recipe's judge. For `judge = "auto"` the first of the successors that works.

    Raises:
        UserError: If there is none.
    """
    judge, recipe = resolved.inputs.judge, resolved.recipe
    is_successor = resolved.asked == "auto" and judge.name in successors()
    others = [name for name in successors() if name != judge.name] if is_successor else []
    notes: list[str] = []
    for name in others:
        found = check_judge(judge, recipe, live=True)
        if not found.problems:
            return replace(found, notes=(*notes, *found.notes))
        notes.append(f"judge: {name} instead of {judge.name}: {'; '.join(found.problems)}")
        judge = kind_of(name).identify(name, recipe, Material(resolved.inputs.trait))
    found = require_judge(judge, recipe)
    return replace(found, notes=(*notes, *found.notes))


def as_before(judge: JudgeIdentity, known: Mapping[str, Any]) -> JudgeIdentity:
    """A judge, read and fitted in the way that a folder's verdicts were."""
    if known.get("method") not in ("logprobs", "samples"):
        return judge
    kept = {key: known.get(key, getattr(judge, key)) for key in ("method", "samples", "effort", "tops", "note")}
    return replace(judge, **kept, own=bool(known.get("own")))  # earlier versions fitted no judge on a model's own answers


def require_judge(identity: JudgeIdentity, recipe: Recipe, hint: str | None = None, *, live: bool = True) -> JudgeCheck:
    """The judge, checked before it is asked anything.

    Args:
        hint: What to do if it cannot judge; by default, what a new run can do.
        live: As of `check_judge`.

    Raises:
        UserError: If it cannot judge.
    """
    found = check_judge(identity, recipe, live=live)
    if found.problems:
        raise UserError(
            f"`{identity.name}` cannot judge: " + "; ".join(found.problems),
            hint=hint or HINT,
        )
    return found


ELSEWHERE = "`--api-base URL` asks another server"
"""What to do on a command line that names a judge."""

HINT = 'a run with `judge = "embedded"` needs none of this, and `iterft judge RUN --judge ...` can judge its answers later'


def begun_hint(folder: Path, what: Literal["run", "study"]) -> str:
    """What to do where a run or a study has begun whose judge cannot judge: its judge cannot be another one."""
    command = "run RECIPE" if what == "run" else "sweep STUDY"
    return (
        f"a {what} has one judge: `iterft {command} --set judge=NEW --out DIR --reuse {folder}` goes on with another in a new "
        "folder; what does not rest on verdicts is not made again"
    )


def _probed(identity: JudgeIdentity, recipe: Recipe) -> JudgeCheck:
    """A judge tried out, in a process of its own."""
    options = {"identity": asdict(identity), "max_usd": recipe.max_usd}
    child = Child(
        "iterft_lite.backends.judge.probe:LitellmProbe",
        Prober,
        log=cache_folder() / "logs/probe.log",
        options=options,
        secrets="judges",
    )
    try:
        found = cast(Prober, child).probe(recipe.judge_samples if recipe.judge_method == "auto" else 0)
    finally:
        child.close()
    return JudgeCheck(found.identity, (), found.notes)


def _problems(identity: JudgeIdentity) -> Iterator[str]:
    """Reasons why a judge cannot judge."""
    name, address, variables = identity.name, identity.address, environment(Path.cwd())
    if has_ended(name, address):
        yield f"it was switched off by its provider: {way_on(name)}"
        return
    if unknown := unknown_provider(name):
        yield unknown
        return
    provider = provider_of(name)
    if not address and provider.known and not provider.signed:
        yield f"`{provider.name}` has no server of its own: set `api_base`, or {provider.redirects[0]}"
        return
    key = key_of(name, address, variables)
    where = " or ".join(key_variables(name, address))
    if needs_key(name, address) and not key:
        yield f"there is no key for {address}: set {where} in the environment or .env"
        return
    if provider.lists and address:
        yield from (scrub(problem, variables) for problem in _listed(identity, key, where))


def _listed(identity: JudgeIdentity, key: str | None, where: str) -> Iterator[str]:
    """Problems of a judge that the server's list of models shows."""
    provider, address = provider_of(identity.name), identity.address
    model = identity.name.split("/", 1)[1]
    serve, pull = (command.format(model=shlex.quote(model)) for command in (provider.serve, provider.pull))
    try:
        known = _get(address + provider.lists, key)
    except HTTPError as error:
        if error.code in (401, 403):
            yield f"{address} refuses the key ({error.code}): set {where}" if where else f"{address} wants a key"
        return  # the server lists nothing: the first question will show
    except (OSError, http.client.HTTPException, ValueError) as error:
        proxy = proxy_for(address)
        reason = error.reason if isinstance(error, URLError) else error
        start = f": `{serve}` starts it" if serve else ""
        yield f"no answer from {address}: {reason}" + (f", through the proxy {proxy}" if proxy else start)
        return
    if known is not None and not any(name == model or name.split(":")[0] == model for name in known):
        shown = ", ".join(sorted(known)[:5]) + (", ..." if len(known) > 5 else "")
        yield f"{address} has no model `{model}`; it has {shown or 'none'}" + (f"; `{pull}` fetches it" if pull else "")


class _Stay(HTTPRedirectHandler):
    """Follows no redirect, which would send the key to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the redirect is an error."""
        return


def _opener() -> OpenerDirector:
    return build_opener(_Stay)


def _get(url: str, key: str | None) -> list[str] | None:
    """Names of the models that a server lists; None if its answer is of another shape."""
    request = Request(url, headers={"Authorization": f"Bearer {key or STAND_IN}", "Accept-Encoding": "identity"})
    with _opener().open(request, timeout=PATIENCE) as response:
        body = response.read(MOST_BYTES)
    try:
        found = json.loads(body)
        rows = found["data"] if "data" in found else found["models"]
        return [str(row.get("id") or row.get("name")) for row in rows]
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
