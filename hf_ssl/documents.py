"""YAML and JSON that a user gives: bounded before they are read, and every complaint a sentence with its line.

What comes out is as in JSON: dicts with text keys, lists, text, booleans, None, whole and finite numbers. A document
whose aliases expand, whose brackets nest without end or whose keys repeat is refused before anything is built of it.
"""

import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 4 << 20  # of a file; a thousand classes with fifty descriptions each take less
MAX_JSON_BYTES = 256 << 20  # of a log or a list of row numbers
MAX_DEPTH, MAX_NODES = 32, 100_000
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)  # an open string ends with the text


class DocumentError(ValueError):
    """What is wrong with a document: words that go on after its name, such as "line 3: 'seed' is given twice"."""


def read_document(path: str | Path) -> Any:
    """The content of a YAML or JSON file. Raises DocumentError."""
    return parse(read_text(path))


def read_json(path: str | Path) -> Any:
    """The content of a JSON file that a run wrote: larger ones too, NaN too. Raises DocumentError, the file named."""
    try:
        return parse_json(read_text(path, MAX_JSON_BYTES), finite=False)
    except DocumentError as error:
        raise DocumentError(f"{path}: {error}") from None


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of an ordinary file in UTF-8, with or without a byte order mark. Raises DocumentError."""
    path = Path(path).expanduser()
    try:
        kind = path.stat()
        if not stat.S_ISREG(kind.st_mode):
            raise DocumentError("it is not an ordinary file")
        if kind.st_size > max_bytes:
            raise DocumentError(f"it has {kind.st_size:,} bytes, and at most {max_bytes:,} are read")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise DocumentError(error.strerror or str(error)) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DocumentError(f"line {line}: it is not text in UTF-8") from None


def parse(text: str) -> Any:
    """The content of a YAML or JSON document. Raises DocumentError."""
    if text.lstrip()[:1] not in ("{", "["):
        return parse_yaml(text)
    try:
        return parse_json(text)
    except _NotJSON:  # YAML has brackets of its own: {a: 1}
        return parse_yaml(text, "neither YAML nor JSON")


class _NotJSON(DocumentError):
    """Broken as JSON; it may be YAML still."""


def parse_json(text: str, finite: bool = True) -> Any:
    """The value of a JSON text. Raises DocumentError for what is none, nests too deep or repeats a key.

    finite: refuse NaN and Infinity as well, which Python's own writer lets through.

    >>> parse_json('{"count": 4}')
    {'count': 4}
    """
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > MAX_DEPTH:
            raise DocumentError(f"{_line_of(text, found.start())}it nests more than {MAX_DEPTH} deep")
    try:
        strict: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
        return json.loads(text, object_pairs_hook=_object, **strict)
    except json.JSONDecodeError as error:
        raise _NotJSON(f"{_line_of(text, error.pos)}it is not JSON ({error.msg})") from None
    except DocumentError:
        raise
    except (ValueError, RecursionError):  # int() has a limit of digits
        raise DocumentError("it holds a number of thousands of digits") from None


def _line_of(text: str, position: int) -> str:
    """ "line 3: ", nothing where the text is one line."""
    line = text.count("\n", 0, position) + 1
    return f"line {line}: " if "\n" in text.strip() else ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DocumentError(f"{twice!r} is given twice")
    return found


def _no_constant(name: str) -> float:
    raise DocumentError(f"{name} is not a number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise DocumentError(f"{text[:40]} is larger than any number a machine holds")
    return number


# --- YAML -----------------------------------------------------------------------------------------------------------


def parse_yaml(text: str, broken: str = "not YAML") -> Any:
    """The value of a YAML document: plain data, keys as they are written. Raises DocumentError: "it is `broken`"."""
    import yaml

    try:
        return _Builder(text).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        words = " ".join(str(getattr(error, "problem", None) or error).split())
        raise DocumentError(f"it is {broken}{where}: {words[:200].rstrip('.')}") from None


class _Builder:
    """Values from PyYAML's events, which come one by one: reading ends where the document is too deep or too large."""

    def __init__(self, text: str):
        import yaml

        self.yaml = yaml
        self.events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        self.resolver, self.constructor = yaml.resolver.Resolver(), yaml.constructor.SafeConstructor()
        self.anchors: dict[str, tuple[Any, int]] = {}  # name -> value, how many values it stands for
        self.nodes = 0

    def document(self) -> Any:
        found, documents = None, 0
        for event in self.events:
            if isinstance(event, self.yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise DocumentError(f"line {_line(event)}: it holds more than one document")
                found = self.value(next(self.events), 0)
        return found

    def value(self, event: Any, depth: int) -> Any:
        before = self.nodes
        if isinstance(event, self.yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise DocumentError(f"line {_line(event)}: *{event.anchor} names nothing above it, or itself")
            found, size = self.anchors[event.anchor]
            self.count(size, event)
            return found
        self.count(1, event)
        if depth > MAX_DEPTH:
            raise DocumentError(f"line {_line(event)}: it nests more than {MAX_DEPTH} deep")
        if event.tag not in (None, "!"):
            raise DocumentError(f"line {_line(event)}: the tag {event.tag} is not read; write plain values")
        if isinstance(event, self.yaml.ScalarEvent):
            found = self.scalar(event)
        elif isinstance(event, self.yaml.SequenceStartEvent):
            found = list(self.items(depth))
        else:
            found = self.mapping(event, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = found, self.nodes - before
        return found

    def count(self, nodes: int, event: Any) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise DocumentError(
                f"line {_line(event)}: it stands for more than {MAX_NODES:,} values, its aliases (*name) counted"
            )

    def items(self, depth: int) -> Iterator[Any]:
        while not isinstance(event := next(self.events), self.yaml.SequenceEndEvent):
            yield self.value(event, depth + 1)

    def mapping(self, start: Any, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self.events), self.yaml.MappingEndEvent):
            if not isinstance(event, self.yaml.ScalarEvent):
                raise DocumentError(f"line {_line(event)}: a key must be text, not a list, a mapping or an alias")
            if event.value == "<<" and event.implicit[0]:
                raise DocumentError(f"line {_line(event)}: << takes over no other fields here; write them out")
            if event.value in found:
                raise DocumentError(f"{event.value!r} is given twice (line {_line(start)} on)")
            self.count(1, event)
            found[event.value] = self.value(next(self.events), depth + 1)
        return found

    def scalar(self, event: Any) -> Any:
        """Text, or what YAML 1.1 takes plain text for: null, true, 3, 0x1f, 1.5."""
        if not event.implicit[0]:
            return event.value
        tag = self.resolver.resolve(self.yaml.ScalarNode, event.value, (True, False)).rpartition(":")[2]
        if tag not in ("null", "bool", "int", "float"):
            return event.value
        node = self.yaml.ScalarNode(tag, event.value)
        try:
            if len(event.value) > 400:  # 1:1:1:... to the base of 60 would be counted for hours
                raise ValueError
            found = getattr(self.constructor, f"construct_yaml_{tag}")(node)
        except (ValueError, OverflowError):
            found = math.nan
        if isinstance(found, float) and not math.isfinite(found):
            raise DocumentError(f"line {_line(event)}: {event.value[:40]!r} is not a number that a machine holds")
        return found


def _line(event: Any) -> int:
    return event.start_mark.line + 1
