"""Which server a judge's calls go to, and with which key: found once, in one place (`providers.toml`), and always passed on.

litellm would look for both itself: in some hundred environment variables, any of which can send a question and a key to another
server under the same judge's name. Here an address has three sources, the recipe's `api_base`, the provider's own
variable, or the provider's server; and a key goes to no server but the one it is for: the provider's own, or one whose
name is in the variable (`ITERFT_KEY_` and host).
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from iterft_lite.errors import UserError

TABLE = Path(__file__).with_name("providers.toml")

OWN_KEY = "ITERFT_KEY_"
"""What the variable begins with that holds the key for a server of the user's own; its host (and port) follows."""

STAND_IN = "none"
"""Sent to a server that no key is known for: OpenAI's client insists on one, and litellm would otherwise look for another's."""


@dataclass(frozen=True)
class Provider:
    """A row of `providers.toml`; one that is not in it has variables of the usual names and 20 candidates.

    Attributes:
        name: As before the slash of a judge's name.
        address: Of its own server, or "".
        redirects: Environment variables that name another.
        keys: Environment variables with its key.
        tops: Candidates a token at most; 0: it gives no probabilities.
        hosts: Endings of names of servers that are the provider's own although every user has another.
        signed: Calls are signed with what the keys say; they are no header.
        lists: What follows the address where a server lists its models, or "".
        serve, pull: Commands that start a server of the user's own, and bring a model (`{model}`) to it.
        known: It is in the table.
    """

    name: str
    address: str
    redirects: tuple[str, ...]
    keys: tuple[str, ...]
    tops: int
    hosts: tuple[str, ...] = ()
    signed: bool = False
    lists: str = ""
    serve: str = ""
    pull: str = ""
    known: bool = True

    def is_home(self, address: str) -> bool:
        """Whether an address is the provider's own server, reached so that nobody else can pretend to be it."""
        asked, home = urlsplit(address), urlsplit(self.address)
        if self.address:
            return (asked.scheme, asked.netloc.lower()) == (home.scheme, home.netloc)
        named = asked.scheme == "https" and (asked.hostname or "").endswith(self.hosts)
        return (bool(self.hosts) and named) or not address


@dataclass(frozen=True)
class Server:
    """Where a judge is asked.

    Attributes:
        address: "" where only litellm knows it (a provider that is not in the table), or a region decides.
        source: "`api_base`" or the variable that named it; "" for the provider's own.
    """

    address: str
    source: str


@lru_cache
def providers() -> dict[str, Provider]:
    """The table, by name."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: _provider(name, row) for name, row in table.items()}


def _provider(name: str, row: Mapping[str, Any]) -> Provider:
    redirects, keys, hosts = (tuple(row.get(key, ())) for key in ("redirects", "keys", "hosts"))
    commands = {key: row.get(key, "") for key in ("lists", "serve", "pull")}
    return Provider(name, row["address"], redirects, keys, row["tops"], hosts, bool(row.get("signed")), **commands)


def provider_of(judge: str) -> Provider:
    """The provider in a judge's name (`provider/model`)."""
    name = judge.split("/", 1)[0]
    usual = re.sub(r"\W", "_", name).upper()
    unknown = Provider(name, "", (f"{usual}_API_BASE", f"{usual}_BASE_URL"), (f"{usual}_API_KEY",), 20, known=False)
    return providers().get(name, unknown)


@lru_cache
def litellm_providers() -> frozenset[str]:
    """The providers that the installed litellm speaks to; none if they cannot be found.

    Read from its source: importing it takes seconds.
    """
    found = importlib.util.find_spec("litellm")
    source = Path(found.origin).parent / "types/utils.py" if found and found.origin else Path()
    if not source.is_file():
        return frozenset()
    _, _, members = source.read_text(encoding="utf-8").partition("\nclass LlmProviders(")
    return frozenset(re.findall(r'^    [A-Z0-9_]+ = "([^"]+)"', members.split("\nclass ")[0], re.MULTILINE))


def unknown_provider(judge: str) -> str:
    """Why nobody can be asked by a judge's name, with the provider that may be meant; "" if its provider is known."""
    provider, everybody = provider_of(judge), litellm_providers()
    if provider.known or not everybody or provider.name in everybody:
        return ""
    near = difflib.get_close_matches(provider.name, sorted({*providers(), *everybody}), n=1)
    meant = f"did you mean `{near[0]}`?" if near else 'a server of your own is "openai/MODEL" with `api_base`'
    return f"there is no provider `{provider.name}`: {meant}"


def server_of(judge: str, api_base: str | None, variables: Mapping[str, str]) -> Server:
    """The server that a judge's calls really go to.

    Args:
        variables: The process's environment; a `.env` file names no servers.

    Raises:
        UserError: If the address is none, or holds a user or a password.
    """
    provider = provider_of(judge)
    named = {"`api_base`": api_base or "", **{name: variables.get(name, "") for name in provider.redirects}}
    source, address = next(((source, text.strip()) for source, text in named.items() if text.strip()), ("", provider.address))
    address = address.rstrip("/")
    parts = urlsplit(address)
    if address and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise UserError(f"{source} is not the address of a server", hint="write it as `http://localhost:8000/v1`")
    if "@" in parts.netloc:
        raise UserError(f"the address in {source} holds a user or a password", hint=f"put the key into {OWN_KEY}HOST")
    return Server(address, "" if address == provider.address else source)


def key_variables(judge: str, address: str) -> tuple[str, ...]:
    """The variables that may hold the key for a server: the provider's at its own, else the one that is named for the
    server."""
    provider = provider_of(judge)
    return provider.keys if provider.is_home(address) else (own_key_variable(address),)


def own_key_variable(address: str) -> str:
    """The variable of the key for a server of the user's own: `http://localhost:8000/v1` is ITERFT_KEY_LOCALHOST_8000."""
    return OWN_KEY + re.sub(r"[^A-Z0-9]", "_", urlsplit(address).netloc.upper())


def key_of(judge: str, address: str, variables: Mapping[str, str]) -> str | None:
    """The key for a server, or None if there is none. A key of blanks is none."""
    found = (variables.get(name, "").strip() for name in key_variables(judge, address))
    return next(filter(None, found), None)


def needs_key(judge: str, address: str) -> bool:
    """Whether nobody can be asked without a key: at the provider's own servers, but for those on the user's own machine."""
    provider = provider_of(judge)
    return provider.known and not provider.signed and bool(provider.keys) and provider.is_home(address)


def names_a_key(variable: str) -> bool:
    """Whether a variable is one that keys are looked for in."""
    return variable.startswith(OWN_KEY) or any(variable in provider.keys for provider in providers().values())


def proxy_for(address: str) -> str:
    """The proxy that calls to an address go through, or ""."""
    parts = urlsplit(address)
    if not parts.hostname or proxy_bypass(parts.hostname):
        return ""
    return re.sub(r"(?<=://)[^/@]*@", "", getproxies().get(parts.scheme) or getproxies().get("all") or "")
