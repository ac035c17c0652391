"""Keys: read from the environment or a .env file, and cut out of every text that leaves a judge."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path

from iterft_lite.backends.judge.providers import names_a_key
from iterft_lite.errors import UserError

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

MOST_BYTES = 1 << 20
"""Of a `.env` file that are read."""


def environment(folder: Path) -> dict[str, str]:
    """The process's variables; from a `.env` file in `folder` only keys of judges that the process has none of. Writes nothing.

    Keys lose the blanks and line ends around them.

    Raises:
        UserError: If the file is not text.
    """
    process = {name: value.strip() if names_a_key(name) else value for name, value in os.environ.items()}
    in_file = {name: (value or "").strip() for name, value in _dotenv(folder / ".env").items() if names_a_key(name)}
    return {name: value for name, value in in_file.items() if value and not process.get(name)} | process


def _dotenv(path: Path) -> Mapping[str, str | None]:
    """What a `.env` file assigns."""
    from dotenv import dotenv_values

    try:
        data = path.read_bytes()[:MOST_BYTES] if path.is_file() else b""
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read: {error}", hint="write it as UTF-8 text, a `NAME=value` a line") from None
    return dotenv_values(stream=io.StringIO(text), interpolate=False)


def scrub(text: str, variables: Mapping[str, str] | None = None) -> str:
    """A text without keys: the values of all variables named like secrets, and what looks like one."""
    named = os.environ if variables is None else variables
    values = [
        value for name, value in named.items() if (SECRET_NAME.search(name) or names_a_key(name)) and len(value) >= SHORTEST
    ]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return LOOKS_SECRET.sub(HIDDEN, text)
