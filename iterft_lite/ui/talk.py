"""A conversation in a terminal. Prints words as they arrive, wrapped between words. Lines that begin with `/` are commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

from iterft_lite.app.chat import Talk
from iterft_lite.errors import UserError
from iterft_lite.ui.foreign import safe

HELP = """\
/cycle N        continue with cycle N's model; -1 is the untouched one
/system TEXT    told to the model before the first turn; without TEXT nothing is
/again          forget what was said
/help           this
an empty line or Ctrl-D ends"""

WIDEST = 100
"""Most columns of a line: longer ones are hard to read."""


@dataclass
class WordWriter:
    """Writes a growing text in whole words and never breaks one at the edge.

    Attributes:
        write: Prints a text.
        width: Columns of a line.
        column: Column of the next character.
    """

    write: Callable[[str], None]
    width: int
    column: int = 0
    _shown: int = 0

    def take(self, text: str) -> None:
        """Print the whole words of a text that were not printed yet.

        Args:
            text: The whole text so far.
        """
        text = safe(text).lstrip()
        whole = max(text.rfind(" "), text.rfind("\n")) + 1
        if whole > self._shown:
            self._put(text[self._shown : whole])
            self._shown = whole

    def finish(self, text: str) -> None:
        """Print the rest, and end the line."""
        text = safe(text).lstrip()
        self._put(text[self._shown :])
        self.write("\n")
        self.column = self._shown = 0

    def _put(self, text: str) -> None:
        for number, line in enumerate(text.split("\n")):
            if number:
                self._line_end()
            for word in line.split(" "):
                self._word(word)

    def _word(self, word: str) -> None:
        if not word:
            return
        if self.column and self.column + 1 + len(word) > self.width:
            self._line_end()
        lead = " " if self.column else ""
        self.write(lead + word)
        self.column += len(lead) + len(word)

    def _line_end(self) -> None:
        self.write("\n")
        self.column = 0


def converse(talk: Talk, ask: Callable[[], str], write: Callable[[str], None], *, temperature: float, max_tokens: int) -> None:
    """Take turns until an empty line.

    Args:
        ask: Gives the user's next line; "" ends.
        write: Prints a text.
    """
    write(f"{safe(talk.title)}\n/help says what else can be done; an empty line ends\n")
    while said := ask().strip():
        if said.startswith("/"):
            write(f"{command(talk, said)}\n")
            continue
        write(f"{talk.name}:")
        words = WordWriter(write, min(WIDEST, shutil.get_terminal_size().columns), column=len(talk.name) + 1)
        words.finish(talk.reply(said, temperature=temperature, max_tokens=max_tokens, on_text=words.take))


def command(talk: Talk, line: str) -> str:
    """Obey a line that begins with `/`; returns the message for the user."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    try:
        match name:
            case "cycle" if rest.lstrip("-").isdigit():
                talk.turn_to(int(rest))
                return f"{talk.title}, from the beginning"
            case "cycle":
                return f"which one? finished: {', '.join(map(str, talk.cycles))}"
            case "system":
                talk.tell(rest)
                return f"told before the first turn: {rest}" if rest else "nothing is told before the first turn"
            case "again":
                talk.turns.clear()
                return "forgotten"
            case "help":
                return HELP
    except UserError as error:
        return str(error)
    return f"there is no `/{name}`\n{HELP}"
