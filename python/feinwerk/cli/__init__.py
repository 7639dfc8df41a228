"""The command `feinwerk`: quickstart fine-tunes a model in NF4, info says what runs here."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from feinwerk.cli.errors import CommandError, require

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; every foreseen error is one sentence on stderr.

    Args:
        arguments: without the program's name; default those of the process.

    Returns:
        The exit status: 0 done, 1 the result is not good enough, 2 wrong use, 130 interrupted.
    """
    try:
        for package in ("typer", "rich"):
            require(package, command="feinwerk")
        from feinwerk.cli.app import app

        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="feinwerk")
    except CommandError as error:
        print(f"feinwerk: {error}", file=sys.stderr)
        return error.status
    except SystemExit as leaving:  # typer's way to end, its own usage errors included
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0
