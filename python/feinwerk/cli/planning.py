"""The command `feinwerk plan`: asks for a plan and prints it, as tables or as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from feinwerk.cli.errors import CommandError
from feinwerk.plan import Plan, plan, table


def run(options: dict[str, Any], *, as_json: bool, console: Console | None = None) -> None:
    """Make a plan and print it.

    Args:
        options: as `feinwerk.plan` takes them; `targets` as one text, parted by commas.
        as_json: print the whole plan as one JSON object instead of tables.
        console: where tables go; by default stdout's.

    Raises:
        CommandError: if an option breaks its rule.
    """
    targets = options["targets"]
    if "," in targets or targets.endswith("_proj"):
        options = {**options, "targets": [name.strip() for name in targets.split(",")]}
    try:
        found = plan(options.pop("model"), **options)
    except (TypeError, ValueError) as error:
        raise CommandError(_as_typed(str(error), options)) from error
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show(found, console or Console(highlight=False))


def _as_typed(message: str, options: dict[str, Any]) -> str:
    """The message with the name of an argument as it is typed on the command line."""
    head, _, rest = message.partition(": ")
    name, _, rule = rest.partition(" ")
    if name == "model" or name in options:
        return f"{head}: --{name.replace('_', '-')} {rule}"
    return message


def show(found: Plan, console: Console) -> None:
    """Print a plan for people."""
    console.print(escape(table.title(found)), style="bold", soft_wrap=True)
    console.print(escape(table.where(found.settings)), style="dim", soft_wrap=True)
    grid = _grid(table.HEAD, right=(1, 2))
    *parts, peak = table.rows(found)
    for row in parts:
        grid.add_row(*map(escape, row))
    grid.add_section()
    grid.add_row(*map(escape, peak), style="bold")
    console.print(grid)
    fit = found.fit
    if fit is None:
        return
    first, *more = table.verdict(found, fit)
    console.print(escape(first), style="bold green" if fit.fits else "bold red", soft_wrap=True)
    for line in more:
        console.print(escape(line), soft_wrap=True)
    options = _grid(table.OPTION_HEAD, right=(0, 1, 2, 3))
    for option, cells in zip(fit.options, table.option_rows(fit), strict=True):
        options.add_row(*map(escape, cells), style="green" if option.fits else "dim")
    console.print(options)


def _grid(head: tuple[str, ...], right: tuple[int, ...]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for i, name in enumerate(head):
        grid.add_column(escape(name), justify="right" if i in right else "left", no_wrap=True)
    return grid
