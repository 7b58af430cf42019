"""One run in a folder at a time: a lock that names the process that holds it. Nothing heavy is imported."""

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..documents import parse_json

NAME = ".run.lock"
logger = logging.getLogger("hf_ssl.training")

_held: dict[str, int] = {}  # folder -> how often this process has it


class RunLocked(OSError):
    """Another run writes into the folder."""


@contextlib.contextmanager
def lock(folder: str | Path, enabled: bool = True) -> Iterator[None]:
    """Within it no other run writes into ``folder``. RunLocked: one does. A process may take it several times.

    What a killed run left is taken over with a word. Where the folder cannot be written to, nothing can be mixed.
    """
    path = Path(folder).absolute() / NAME
    taken = enabled and _take(path)
    try:
        yield
    finally:
        if taken:
            _release(path)


def _take(path: Path) -> bool:
    key = f"{os.getpid()} {path}"  # a forked process does not hold what its parent does
    if key not in _held:
        try:
            with _exclusive(path) as file:
                _refuse_if_running(path, file.read())
                file.seek(0)
                file.truncate()
                file.write(json.dumps(_myself()))
        except RunLocked:
            raise
        except OSError:
            return False
    _held[key] = _held.get(key, 0) + 1
    return True


def _release(path: Path) -> None:
    key = f"{os.getpid()} {path}"
    _held[key] -= 1
    if not _held[key]:
        del _held[key]
        with contextlib.suppress(OSError), _exclusive(path):
            path.unlink()


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[Any]:
    """The lock's file, open; two processes that look at it at once do so one after the other."""
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return  # else its holder removed it meanwhile: there is another one, or none


def _refuse_if_running(path: Path, text: str) -> None:
    if not text:
        return
    try:
        held = parse_json(text)
        pid, host, started = held["pid"], held["host"], held["started"]
        if type(pid) is not int or not isinstance(host, str):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        logger.warning("%s is damaged, so it is taken over.", path)
        return
    if host != _host():
        raise RunLocked(
            f"a run on another machine ({host}, process {pid}) writes into {path.parent}: choose another output_dir, "
            f"or remove {path} if that run has ended"
        )
    if _started(pid) == started:
        raise RunLocked(
            f"another run (process {pid} on this machine) writes into {path.parent}: choose another output_dir, or "
            "end that run first"
        )
    logger.warning("The run that held %s (process %s) has ended without removing its lock.", path.parent, pid)


def _myself() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": _host(), "started": _started(os.getpid())}


def _host() -> str:
    return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process began, so that a later one of the same number is another; None where there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _started_without_proc(pid)
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"  # a zombie has ended


def _started_without_proc(pid: int) -> str | None:
    import psutil  # accelerate depends on it

    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return None
