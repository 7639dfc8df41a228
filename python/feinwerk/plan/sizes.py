"""Bytes as people write them: "24GB" and back."""

from __future__ import annotations

import math
import re

from feinwerk import _checks
from feinwerk.plan.architecture import OP

_UNITS = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse(name: str, text: str | float) -> int:
    """Return the bytes that a text such as "24GB", "23.5 GiB" or "800MB" means.

    Args:
        name: of the argument, for messages.
        text: a number with a unit (GB is 10^9 bytes, GiB is 2^30), or bytes as a number.

    Raises:
        ValueError: if it is not above 0, or not of this form.

    Example:
        >>> parse("memory", "1.5 GiB")
        1610612736
    """
    if isinstance(text, bool) or not isinstance(text, str):
        value = float(text)
    else:
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
        units = {unit.lower(): size for unit, size in _UNITS.items()}
        unit = "" if found is None else (found[2].lower() or "b")
        if found is None or unit not in units:
            rule = "be bytes, or a number with a unit such as 24GB or 22.5GiB"
            _checks.reject(ValueError, OP, name, rule, repr(text))
        value = float(found[1]) * units[unit]
    if not (math.isfinite(value) and value >= 1):
        _checks.reject(ValueError, OP, name, "be at least one byte", text)
    return int(value)


def show(size: float) -> str:
    """Return bytes in the unit that suits them, of powers of 1000, with three digits.

    Example:
        >>> show(5_340_000_000), show(999), show(0)
        ('5.34 GB', '999 B', '0 B')
    """
    power = 0
    while power < 4 and abs(size) >= 999.5 * 1000**power:
        power += 1
    value = size / 1000**power
    if power == 0:
        return f"{value:.0f} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {'KMGT'[power - 1]}B"
