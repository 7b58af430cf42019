"""Paths that a user or a data set names: only regular files are opened, and every name can be stored and printed.

A pipe would be waited for without end, a device read without end. A name on disk is bytes, and need not be UTF-8:
Python carries such a name with surrogates, which neither Arrow nor a terminal takes. Arrow gets its file: address, and
people read it with the strange bytes as ``\\xff``.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

_ADDRESS = "file://"
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)


class NotRegularError(OSError):
    """The path is no regular file; `strerror` says what it is instead."""

    def __str__(self) -> str:
        return f"{printable(str(self.filename))} is {self.strerror}."


def open_regular(path: str | os.PathLike, mode: str = "rb", **options: Any) -> Any:
    """`open` for reading, of regular files alone. OSError; NotRegularError for a pipe, a device or a folder."""
    return open(os.fspath(path), mode, opener=_open, **options)  # never a number, which is an open file


def read_starting(path: str | os.PathLike, start: bytes) -> bytes | None:
    """The bytes of a regular file that begins with `start`, else None; in half of `open`'s time. OSError as above."""
    descriptor, size = _descriptor(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.read(descriptor, len(start)) != start:
            return None
        parts, missing = [start], size - len(start)
        while missing > 0 and (part := os.read(descriptor, missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def read_text(path: str | os.PathLike, encoding: str = "utf-8") -> str:
    """A regular text file's content; errors as `open_regular`, and UnicodeDecodeError."""
    with open_regular(path, "r", encoding=encoding) as file:
        return file.read()


def check_regular(path: str | os.PathLike) -> None:
    """For what a library opens by its path. OSError as `open_regular`."""
    _check(path, os.stat(path).st_mode)


def printable(name: str) -> str:
    """The name of a file or folder as messages show it: bytes that are not UTF-8 as ``\\xff``."""
    if name.isascii():
        return name
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return name.encode("utf-8", "backslashreplace").decode()


def printable_record(value: Any) -> Any:
    """A record of JSON types with every text, keys too, as `printable` shows it."""
    if isinstance(value, dict):
        return {printable_record(key): printable_record(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_record(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def storable(path: str) -> str:
    """The path as Arrow can hold it: itself, or a file: address where its bytes are not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return _ADDRESS + quote_from_bytes(os.fsencode(os.path.abspath(path)))
    return path


def local_path(path: str) -> str:
    """The path that `storable` was given."""
    return os.fsdecode(unquote_to_bytes(path[len(_ADDRESS) :])) if path.startswith(_ADDRESS) else path


@dataclass(frozen=True)
class Home:
    """Where the files lie that a data set's rows may name: below these folders, or in this dataset repo of the Hub."""

    folders: tuple[str, ...]
    repo: str | None = None


class OutsideError(ValueError):
    """A row names a file that it may not; the message says why."""


def resolved(path: str, home: Home | None, outside: bool = False) -> str:
    """The path or address to open for a row's `path`, relative ones taken from the first folder. OutsideError.

    `outside`: everything is allowed. Without a home: every file of this machine, and of the Hub. Links are followed.
    """
    if path.startswith(_ADDRESS):
        path = local_path(path)
    place = path.rpartition("::")[2]  # of a file in an archive: the archive
    if "://" in place:
        hub = "hf://" if home is None else f"hf://datasets/{home.repo}"
        if not outside and not (
            place.startswith(hub) and (home is None or place[len(hub) : len(hub) + 1] in ("@", "/"))
        ):
            raise OutsideError("the row names an address outside of its data set; --allow_outside_files reads those")
        return path
    if home is None:
        return path
    full = os.path.normpath(place) if os.path.isabs(place) else _inside(place, home)
    if outside or any(full.startswith(os.path.join(folder, "")) for folder in home.folders):
        return path.replace(place, full) if place != path else full
    raise OutsideError(
        f"the row names a file outside of its data set ({home.folders[0]}); --allow_outside_files reads those"
    )


def _inside(path: str, home: Home) -> str:
    full = os.path.normpath(os.path.join(home.folders[0], path))
    return full if os.path.exists(full) else os.path.abspath(path)


def _open(path: str, flags: int) -> int:
    return _descriptor(path, flags)[0]


def _descriptor(path: str | os.PathLike, flags: int) -> tuple[int, int]:
    """An open regular file and its size in bytes."""
    # without waiting: opening a pipe would wait for its writer
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket's error
            check_regular(path)
        raise
    status = os.fstat(descriptor)
    try:
        _check(path, status.st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _check(path: str | os.PathLike, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((words for test, words in _KINDS if test(mode)), "something else")
        raise NotRegularError(0, f"{kind}, not a regular file", os.fspath(path))
