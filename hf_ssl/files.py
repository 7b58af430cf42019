"""Files and folders appear whole or not at all: written beside, and renamed when all of it is there.

What was there before stays until then. A full disk, an error, Ctrl-C or SIGTERM leave it as it was and no scratch
behind; after SIGKILL a hidden `.<name>.<pid>.part` may be left, never half a file under its name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType

_GATES = ("config.json", "ssl/config.json")  # a folder without them loads as nothing: taken first, put back last
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_WORDS = re.compile(r"No space left|os error 28|failed writing file|file write failed", re.IGNORECASE)


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk or quota is full; torch and safetensors tell it in words alone."""
    if getattr(error, "errno", None) in _FULL or "No space left" in str(error):
        return True
    return type(error).__name__ in ("SafetensorError", "RuntimeError") and bool(_FULL_WORDS.search(str(error)))


class WriteError(OSError):
    """Something could not be written; one sentence. What was there before is untouched."""

    def __init__(self, path: Path, error: BaseException):
        is_full = is_disk_full(error)
        why = "the disk is full" if is_full else getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
            why = f"there is no folder {path.parent}"
        kept = "what was there before is untouched" if path.exists() else "nothing was left there"
        todo = "Free some space, or give another place." if is_full else "Give another place, or mend that."
        super().__init__(f"{path} cannot be written: {why}; {kept}. {todo}")
        self.errno = errno.ENOSPC if is_full else getattr(error, "errno", None)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A scratch path with the same suffix, to write to; what is there when the block ends well becomes `path`.

    A device or a pipe (/dev/stdout) is handed out as it is. Raises WriteError where anything cannot be written.
    """
    path = Path(os.path.realpath(Path(path).expanduser()))  # a link stays a link
    if path.exists() and not path.is_file():
        yield path
        return
    scratch = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    with _terminable():
        try:
            yield scratch
            with scratch.open("rb+") as file:
                os.fsync(file.fileno())  # a disk may say only now that it is full
            if path.exists():
                shutil.copymode(path, scratch)
            scratch.replace(path)
        except Exception as error:
            if not _is_of_writing(error):
                raise
            raise WriteError(path, error) from error
        finally:
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """An empty scratch folder to write into, whose files are in the folder `path` when the block has ended well.

    Other files that are in `path` already stay, but for those that match `stale` (globs over paths within it) and were
    not written anew. At no moment does `path` hold a model that is half old and half new: the config.json of root and
    ssl/ goes first and comes last. Raises WriteError where anything cannot be written.
    """
    path = Path(os.path.realpath(Path(path).expanduser()))
    is_new = not path.exists()
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part") if is_new else path / f".{os.getpid()}.part"
    missing = [folder for folder in scratch.parents if not folder.exists()]
    with _terminable():
        try:
            shutil.rmtree(scratch, ignore_errors=True)  # of a killed process that had this number
            scratch.mkdir(parents=True)
            yield scratch
            _sync(scratch)
            if is_new:
                scratch.rename(path)
            else:
                _move_in(scratch, path, stale)
        except Exception as error:
            if not _is_of_writing(error):
                raise
            raise WriteError(path, error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            for folder in missing:
                with contextlib.suppress(OSError):  # not empty: all is well
                    folder.rmdir()


def _move_in(scratch: Path, path: Path, stale: Sequence[str]) -> None:
    """Renames only, so nothing can run out of space; an error in between puts everything back."""
    new = [file.relative_to(scratch).as_posix() for file in scratch.rglob("*") if file.is_file()]
    old = scratch / ".old"
    gone = [
        name
        for file in path.rglob("*")
        if file.is_file() and scratch not in file.parents and (name := file.relative_to(path).as_posix()) not in new
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in stale)
    ]
    held = [name for name in (*new, *gone) if (path / name).is_file()]
    moves = [(path / name, old / name) for name in sorted(held, key=_gate, reverse=True)]
    moves += [(scratch / name, path / name) for name in sorted(new, key=_gate)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.replace(source)
        raise


def _gate(name: str) -> int:
    """Last for what makes a folder loadable, the root's after that of ssl/."""
    return 1 + len(_GATES) - _GATES.index(name) if name in _GATES else 0


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


def _is_of_writing(error: Exception) -> bool:
    """OSErrors, and those of Rust libraries, which have a class of their own or none."""
    is_rust = type(error).__name__ == "SafetensorError" or "os error" in str(error)
    return isinstance(error, OSError) or is_rust


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as an exit does, so that it can clean up; an earlier handler stays in charge."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
