"""Keys: read from the environment or a .env file, and cut out of every text that leaves a judge."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)

SHORTEST = 6
"""Characters of a value that is taken for a secret: shorter ones (`none`, `x`) would blot out words."""

LOOKS_SECRET = re.compile(
    r"""\b(?:sk|pk|rk|gsk|xai|hf|key)[-_](?=\S*[0-9*])[A-Za-z0-9_*.\-]{6,}  # the providers' own shapes, masked ones too
    | \bAIza[\w\-]{10,}
    | (?<=earer\ )[\w\-.~+/=]{6,}                              # Authorization: Bearer ...
    | (?<=://)[^\s/@]+(?=@)                                    # user:password@host
    """,
    re.VERBOSE,
)

HIDDEN = "[key hidden]"


def environment(folder: Path) -> dict[str, str]:
    """The process's variables, with those of a `.env` file in `folder` where the process has none. Writes nothing."""
    from dotenv import dotenv_values

    found = {name: value for name, value in dotenv_values(folder / ".env").items() if value}
    return found | dict(os.environ)


def scrub(text: str, variables: Mapping[str, str] | None = None) -> str:
    """A text without keys: the values of all variables named like secrets, and what looks like one."""
    named = os.environ if variables is None else variables
    values = [value for name, value in named.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return LOOKS_SECRET.sub(HIDDEN, text)
