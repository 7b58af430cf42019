"""Which numbers a field may hold: a class states them once, and the command line reads the same lines.

``limits = {"temperature": "(0, inf)", "queue_size": "[1, inf)"}``: intervals, round brackets exclude their end. A
number whose field is not named is 0 or more if its default is. Whole numbers have 31 bits. A class checks itself when
it is made; the command line reads ``limits`` from its source, before torch is imported.
"""

import dataclasses
import math
from typing import Any

LARGEST = 2**31 - 1  # of a whole number: no tensor has more rows, no run more steps
NOT_NEGATIVE = "[0, inf)"


def problem(value: Any, interval: str | None, default: Any = None) -> str | None:
    """What a number must be, in words that follow its name, where ``value`` is not that; None where it is.

    >>> problem(0, "(0, inf)")
    'must be positive'
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if interval is None:
        interval = NOT_NEGATIVE if isinstance(default, (int, float)) and default >= 0 else "(-inf, inf)"
    alone, ends, low, high = _read(interval)
    if value == alone and alone is not None:
        return None
    if isinstance(value, int) and high == math.inf and value > LARGEST:
        return f"must be at most {LARGEST}"
    within = low <= value <= high and math.isfinite(value)
    if within and not (value == low and ends[0] == "(") and not (value == high and ends[1] == ")"):
        return None
    return f"must be {words(interval)}"


def _read(interval: str) -> tuple[float | None, str, float, float]:
    """(a value that is allowed as well, both brackets, low, high) of "[0, 1)" or "-1 or [1, inf)"."""
    alone, _, interval = interval.rpartition(" or ")
    low, high = (float(end) for end in interval[1:-1].split(","))
    return float(alone) if alone else None, interval[0] + interval[-1], low, high


def words(interval: str) -> str:
    """ "positive", "0 or more", "at least 1", "from 0 to 1", "above 0 and below 1", ..."""
    alone, ends, low, high = _read(interval)
    if low == -math.inf:
        return "a finite number"
    if high < math.inf:
        if ends == "[]":
            return f"from {low:.0f} to {high:.0f}"
        first = f"above {low:g}" if ends[0] == "(" else f"at least {low:g}"
        return f"{first} and {'below' if ends[1] == ')' else 'at most'} {high:g}"
    if ends[0] == "(":
        return "positive" if low == 0 else f"above {low:g}"
    return f"{f'{alone:g} or ' if alone is not None else ''}{'0 or more' if low == 0 else f'at least {low:g}'}"


def limits_of(cls: type) -> dict[str, str]:
    """Those of ``cls`` and, where it states none, of its bases."""
    return {
        name: interval for base in reversed(cls.__mro__) for name, interval in vars(base).get("limits", {}).items()
    }


def check(instance: Any) -> None:
    """ValueError naming the field where a number of a dataclass lies outside its limits."""
    limits = limits_of(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name, None)
        if wrong := problem(value, limits.get(field.name), field.default):
            raise ValueError(f"{field.name} {wrong}, got {value}")
