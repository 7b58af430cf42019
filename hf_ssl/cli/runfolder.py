"""A run's folder: may it be written to, and what stands in its run.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..documents import DocumentError, read_json
from ..files import whole_file
from ..training.checkpoints import check_model, checkpoints, require_whole
from ..training.lock import lock
from .console import CommandError, masked

_LEFT_BY_A_RUN = ("run.json", "trainer_state.json", "report.html", "model.safetensors")


def held_run(folder: Path) -> str | None:
    """What a run left in `folder`: run.json, a checkpoint, ...; None if there is nothing of the kind."""
    for name in _LEFT_BY_A_RUN:
        if (folder / name).is_file():
            return name
    return next((path.name for path in checkpoints(folder)), None)


def existing(path: str, command: str) -> Path:
    """The folder `path` of a run, a checkpoint or a model. CommandError: there is none, or its model is damaged."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CommandError(f"{command}: there is no folder {folder}.")
    try:
        check_model(folder)
    except ValueError as error:
        raise CommandError(f"{command}: {error}.") from None
    return folder


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make `folder`; within it no other run writes there. Raises CommandError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"The output_dir {folder} cannot be made: {error.strerror or error}.") from None
    with lock(folder):
        yield


def prepare(folder: Path, resume: Any, overwrite: bool) -> None:
    """Make `folder` ready for a run; refuses to mix two runs. Raises CommandError."""
    if resume and overwrite:
        raise CommandError("Give --resume_from_checkpoint or --overwrite: one goes on, the other starts anew.")
    if resume is True and not checkpoints(folder):
        _nothing_to_resume(folder)
    if isinstance(resume, str) and not Path(resume).is_dir():
        try:
            require_whole(resume)
        except ValueError as error:
            raise CommandError(f"{error}.") from None
    if not os.access(folder, os.W_OK):
        raise CommandError(f"The output_dir {folder} is not writable; choose another --output_dir.")
    held = held_run(folder)
    if held is None or resume:
        return
    if not overwrite:
        hint = "--resume_from_checkpoint goes on with it, " if checkpoints(folder) else ""
        raise CommandError(
            f"{folder} already holds a run ({held}); {hint}--overwrite replaces it, another --output_dir keeps both."
        )
    clear(folder)


def _nothing_to_resume(folder: Path) -> None:
    if held_run(folder) is None:
        raise CommandError(
            f"{folder} holds no run to resume: the same command without --resume_from_checkpoint begins."
        )
    raise CommandError(
        f"The run in {folder} ended before its first checkpoint, so there is nothing to resume: the same command with "
        "--overwrite instead of --resume_from_checkpoint begins it again."
    )


def clear(folder: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    for path in [*checkpoints(folder), folder / "ssl"]:
        shutil.rmtree(path, ignore_errors=True)
    for name in _LEFT_BY_A_RUN:
        (folder / name).unlink(missing_ok=True)


def cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_run(folder: Path, record: dict[str, Any]) -> None:
    """run.json, secrets masked; written beside and moved, so that a reader never sees half of it."""
    text = json.dumps(masked(record), indent=2, ensure_ascii=False, default=str)
    with whole_file(folder / "run.json") as file:
        # a path that is not UTF-8 is written as JSON's own escape, and read back as it was
        file.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_run(path: Path) -> dict[str, Any]:
    """run.json of a run folder, or of the run that a checkpoint or ssl/ folder belongs to; {} without one."""
    for folder in (path, path.parent):
        try:
            found = read_json(folder / "run.json")
        except DocumentError:
            continue
        return found if isinstance(found, dict) else {}
    return {}
