"""Prints what an extra of pyproject.toml asks for, one a line, the extras it names included.

The Makefile installs these without the package itself, so that a change under csrc/ or to the
version rebuilds the package only.
"""

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def extras() -> dict[str, list[str]]:
    """The table of extras; Python 3.10 has no TOML reader, pip brings one."""
    try:
        import tomllib
    except ImportError:
        from pip._vendor import tomli as tomllib
    return tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]


def requirements(extra: str) -> list[str]:
    """The requirements of one extra."""
    found = []
    for requirement in extras()[extra]:
        nested = re.fullmatch(r"feinwerk\[([\w, -]+)\]", requirement)
        if nested:
            for name in nested[1].split(","):
                found += requirements(name.strip())
        else:
            found.append(requirement)
    return found


print("\n".join(dict.fromkeys(requirements(sys.argv[1]))))
