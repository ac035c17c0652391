"""Commands about recipes: `recipes`."""

from __future__ import annotations

import click


@click.command()
def recipes() -> None:
    """List the shipped recipes."""
    from iterft_lite.data.recipes import shipped_recipes
    from iterft_lite.ui import tables
    from iterft_lite.ui.console import make_console

    rows = [(each.name, each.regime, each.model, each.about) for each in shipped_recipes()]
    tables.show_table(("recipe", "regime", "model", "what it does"), rows, make_console())
