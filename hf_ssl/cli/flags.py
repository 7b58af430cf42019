"""Command lines and recipes into checked values. A complaint is one sentence that names the nearest valid thing."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import limits
from ..documents import DocumentError, parse_json
from ..spelling import nearest
from .console import HIDDEN, UsageError, is_secret
from .fields import Flag

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_WHAT = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "pair": "two numbers such as 0.2,1",
    "numbers": "numbers such as 0.5,0.5,0.5", "list": "a list such as a,b", "dict": 'JSON such as {"name": 1}',
    "json": "a number or JSON", "str": "text",
}  # fmt: skip
_SHORT = reprlib.Repr()  # of a value in a complaint
_SHORT.maxstring = _SHORT.maxother = 80


class BadValue(ValueError):
    """Says what a value must be."""


@dataclass(frozen=True)
class Parsed:
    """A command line: positional words in order, and the checked values of the flags that were given."""

    words: list[str]
    values: dict[str, Any]


def parse(
    argv: Sequence[str], flags: Mapping[str, Flag], command: str, foreign: Mapping[str, str] | None = None
) -> Parsed:
    """Read `argv`. ``--name value``, ``--name=value``, dashes or underscores, ``--no_name`` for booleans.

    foreign: flags of other methods -> whose they are, for the complaint. Raises UsageError.
    """
    words: list[str] = []
    values: dict[str, Any] = {}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or token == "--":
            if token.startswith("-") and len(token) > 1:
                raise UsageError(f"{command}: {token} is no flag; flags start with two dashes.")
            words.append(token)
            continue
        given, equals, text = token[2:].partition("=")
        name = given.replace("-", "_")
        negated = name not in flags and name.startswith("no_") and "bool" in _kinds(flags, name[3:])
        flag = flags.get(name[3:] if negated else name)
        if flag is None:
            raise UsageError(_unknown(command, f"--{given}", name, flags, foreign or {}))
        if negated:
            values[flag.name] = False
            continue
        value: Any = text if equals else _take(flag, tokens)
        if value is None:
            raise UsageError(f"{command}: --{flag.name} needs a value: {describe(flag)}.")
        try:
            values[flag.name] = convert(flag, value)
        except BadValue as error:
            raise UsageError(f"{command}: --{flag.name} {complaint(flag, value, error)}.") from None
    return Parsed(words, values)


def _kinds(flags: Mapping[str, Flag], name: str) -> tuple[str, ...]:
    return flags[name].kinds if name in flags else ()


def _unknown(command: str, shown: str, name: str, flags: Mapping[str, Flag], foreign: Mapping[str, str]) -> str:
    if name in foreign:
        return f"{command}: {shown} is a flag of {foreign[name]}."
    near = nearest(name, flags)
    hint = f"the nearest is --{near}" if near else f"see hf-ssl {command.split()[0]} --help"
    return f"{command}: there is no flag {shown}; {hint}."


def _take(flag: Flag, tokens: list[str]) -> Any:
    """The flag's value off the front of `tokens`; a bare boolean is true; a pair may be two tokens."""
    following = tokens[0] if tokens else None
    if "bool" in flag.kinds:
        words = (*_TRUE, *_FALSE, "none") if "str" not in flag.kinds else None
        if following is None or following.startswith("--") or (words and following.lower() not in words):
            return True
        return tokens.pop(0)
    if following is None or (following.startswith("--") and len(following) > 2):
        return None
    value = tokens.pop(0)
    if "pair" in flag.kinds and _is_number(value) and tokens and _is_number(tokens[0]):
        value = f"{value},{tokens.pop(0)}"
    return value


def complaint(flag: Flag, value: Any, error: BadValue) -> str:
    """What is wrong in words, the value (unless it is a secret) included: must be a whole number, not 'ten'."""
    words = str(error)
    if not words.startswith("must"):
        return words
    return f"{words}, not {HIDDEN if is_secret(flag.name) else _SHORT.repr(value)}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def describe(flag: Flag) -> str:
    """What a value may be, in words."""
    if flag.choices:
        return "one of " + ", ".join(flag.choices)
    kinds = [kind for kind in flag.kinds if not (kind == "int" and "float" in flag.kinds)]
    return " or ".join(_WHAT[kind] for kind in kinds)


def convert(flag: Flag, value: Any) -> Any:
    """`value` (text, or what YAML made of it) as the flag's type. Raises BadValue: "must be a whole number"."""
    none = isinstance(value, str) and value.lower() in ("none", "null") and flag.default != "none"
    if flag.optional and (value is None or none):
        return None
    if flag.choices:
        return _choice(flag, value)
    why = ""
    for kind in flag.kinds:
        try:
            result = _CONVERTERS[kind](value)
        except DocumentError as error:
            why = f" ({error})"
            continue
        except (ValueError, TypeError, OverflowError):
            continue
        if kind in ("int", "float"):
            if wrong := limits.problem(result, flag.limits, flag.default):
                raise BadValue(wrong)
            if flag.group == "training" and float(result).is_integer():
                result = int(result)  # steps and sizes read better, and Trainer takes either
        _check_keys(flag, result)
        return result
    raise BadValue(f"must be {describe(flag)}{why}")


def _choice(flag: Flag, value: Any) -> str:
    if value is False and "no" in flag.choices:  # YAML reads a bare `no` as false
        return "no"
    for choice in flag.choices:
        if isinstance(value, str) and value.lower() == choice.lower():
            return choice
    near = nearest(str(value), flag.choices)
    listed = ", ".join(flag.choices) if len(flag.choices) <= 12 else f"one of {len(flag.choices)} names"
    raise BadValue(f"must be {listed}{f' (the nearest is {near})' if near else ''}")


def _check_keys(flag: Flag, value: Any) -> None:
    """The fields of a dict (or of each dict of a list) against those that the flag says it may hold."""
    known = {field.name: field for field in flag.keys}
    for group in (value if isinstance(value, list) else [value]) if known else []:
        if not isinstance(group, dict):
            raise BadValue("must be a list of JSON objects")
        for name, item in group.items():
            if name == "key":
                continue
            if name not in known:
                near = nearest(str(name), known)
                raise BadValue(f"has no field {name!r}{f' (the nearest is {near})' if near else ''}")
            try:
                convert(known[name], item)
            except BadValue as error:
                raise BadValue(f"holds {name}, which {complaint(known[name], item, error)}") from None


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    raise ValueError


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _number(value: Any) -> float:
    number = _float(value)
    if not math.isfinite(number):
        raise ValueError
    return int(number) if number.is_integer() and "." not in str(value) and "e" not in str(value).lower() else number


def _pair(value: Any) -> Any:
    """[a, b], or one number where a view field takes one for both."""
    if isinstance(value, str):
        value = parse_json(value) if value.startswith("[") else value.split(",")
    items = value if isinstance(value, (list, tuple)) else [value]
    numbers = [_number(item) for item in items]
    if len(numbers) not in (1, 2):
        raise ValueError
    return numbers if len(numbers) == 2 else numbers[0]


def _numbers(value: Any) -> Any:
    """A list of numbers, or one number where one stands for all."""
    if isinstance(value, str):
        value = parse_json(value) if value.startswith("[") else value.split(",")
    numbers = [_number(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    if not numbers:
        raise ValueError
    return numbers if len(numbers) > 1 else numbers[0]


def _list(value: Any) -> list:
    if isinstance(value, str):
        value = parse_json(value) if value.startswith("[") else [item.strip() for item in value.split(",")]
    if not isinstance(value, list):
        raise ValueError
    return value


def _dict(value: Any) -> dict:
    value = parse_json(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError
    return value


def _json(value: Any) -> Any:
    return parse_json(value) if isinstance(value, str) else value


def _str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    return str(value)


_CONVERTERS = {
    "bool": _bool, "int": _int, "float": _float, "pair": _pair, "numbers": _numbers, "list": _list, "dict": _dict,
    "json": _json, "str": _str,
}  # fmt: skip
