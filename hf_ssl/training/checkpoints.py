"""Which checkpoint is whole: each lists its files with sizes and checksums in ``manifest.json``, written last.

Nothing heavy is imported: the command line asks before torch is there.
"""

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..documents import parse_json, read_json

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_WEIGHTS = ("model*.safetensors", "pytorch_model*", "model.safetensors.index.json", "global_step*")
_OPTIMISER = ("optimizer.pt", "optimizer*", "global_step*")  # FSDP writes folders, DeepSpeed one for everything
_RANDOM = ("rng_state*.pth",)


# --- writing ---------------------------------------------------------------------------------------------------------


def seal(folder: str | Path, facts: dict[str, Any]) -> None:
    """List every file of a checkpoint in its manifest, beside ``facts``: the settings that it was trained with."""
    folder = Path(folder)
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST
    )
    with ThreadPoolExecutor(4) as pool:  # reading and crc32 both let other threads run
        sums = list(pool.map(lambda name: [(folder / name).stat().st_size, _checksum(folder / name)], names))
    content = {"facts": facts, "files": dict(zip(names, sums))}
    scratch = folder / f".{MANIFEST}.tmp"
    scratch.write_text(json.dumps({**content, "checksum": _own_checksum(content)}, indent=1))
    scratch.replace(folder / MANIFEST)


def _checksum(path: Path) -> int:
    """CRC-32 of a file: it finds accidents, and costs a fraction of what writing does."""
    total, buffer = 0, bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total = zlib.crc32(memoryview(buffer)[:count], total)
    return total


def _own_checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


# --- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """``facts`` and ``files`` of a checkpoint, None where an earlier version wrote none. ValueError: it is damaged."""
    path = Path(folder, MANIFEST)
    if not path.exists():
        return None
    try:
        found = read_json(path)
        content = {"facts": found["facts"], "files": found["files"]}
        if found["checksum"] != _own_checksum(content):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    return content


def damage(folder: str | Path, part: Callable[[str], bool] = lambda name: True) -> str | None:
    """What is wrong with a checkpoint's files, in words, such as "optimizer.pt is missing"; None where all is well.

    part: which files matter, by name. Without a manifest only what a file says of itself is held against its size.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if manifest is None:
        names = sorted(path.name for path in folder.iterdir() if path.is_file() and part(path.name))
        wrong: Iterator[str | None] = (_contradiction(folder / name) for name in names)
    else:
        listed = {name: (size, crc) for name, (size, crc) in manifest["files"].items() if part(name)}
        wrong = iter([_altered(folder, name, size) for name, (size, _) in listed.items()])
        if (early := next(filter(None, wrong), None)) is not None:
            return early
        with ThreadPoolExecutor(4) as pool:
            sums = list(pool.map(lambda name: _checksum(folder / name), listed))
        wrong = (
            f"{name} holds other bytes than were written" for name, s in zip(listed, sums) if s != listed[name][1]
        )
    return next(filter(None, wrong), None)


def _altered(folder: Path, name: str, size: int) -> str | None:
    try:
        found = (folder / name).stat().st_size
    except OSError:
        return f"{name} is missing"
    return None if found == size else f"{name} has {found:,} of {size:,} bytes"


def _contradiction(path: Path) -> str | None:
    """What a file says of itself against what it is; None where they agree, or where it says nothing."""
    if path.stat().st_size == 0:
        return f"{path.name} is empty"
    try:
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.suffix in (".pt", ".pth", ".bin") and path.name != "training_args.bin":
            zipfile.ZipFile(path).close()
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile, struct.error):
        return f"{path.name} is cut short or holds other bytes than were written"
    return None


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise ValueError
        header = parse_json(file.read(length).decode("utf-8"), finite=False)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if max(ends, default=0) != size - 8 - length:
        raise ValueError


def lacking(folder: str | Path) -> str | None:
    """What a run could not be gone on without, and a checkpoint does not hold; None where it holds all."""
    folder = Path(folder)
    if not (folder / "trainer_state.json").is_file():
        return "trainer_state.json, which is written last, is missing"
    wanted = {"model.safetensors": _WEIGHTS, "optimizer.pt": _OPTIMISER, "rng_state.pth": _RANDOM}
    if not any(folder.glob("global_step*")):
        wanted["scheduler.pt"] = ("scheduler.pt",)
    absent = (name for name, known in wanted.items() if not any(any(folder.glob(pattern)) for pattern in known))
    return next((f"{name} is missing" for name in absent), None)


def trouble(folder: str | Path) -> str | None:
    """Why a run cannot go on from a checkpoint, in words; None where it can."""
    return lacking(folder) or damage(folder)


def is_remains(folder: str | Path) -> bool:
    """Whether a run that was killed left a part of a checkpoint, which it was writing or removing."""
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return False  # damaged otherwise: not ours to remove
    if manifest is None:
        return not (folder / "trainer_state.json").is_file()
    return not all((folder / name).exists() for name in manifest["files"])


# --- choosing --------------------------------------------------------------------------------------------------------


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders checkpoint-N of a run, the oldest first; whole or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.rpartition("-")[2]))


def newest_whole(output_dir: str | Path) -> tuple[str | None, list[str]]:
    """The newest checkpoint that a run can go on from, and each newer one with what is wrong with it."""
    passed: list[str] = []
    for folder in reversed(checkpoints(output_dir)):
        wrong = trouble(folder)
        if wrong is None:
            return str(folder), passed
        passed.append(f"{folder.name} ({wrong})")
    return None, passed


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run that is whole; None without one."""
    return newest_whole(output_dir)[0]


def require_whole(folder: str | Path) -> None:
    """ValueError where ``folder`` is no checkpoint that a run can go on from; it names one that is."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no checkpoint {folder}{_instead(folder.parent)}")
    if checkpoints(folder):
        raise ValueError(f"{folder} is a run, not a checkpoint of one{_instead(folder)}")
    if (wrong := trouble(folder)) is not None:
        raise ValueError(f"the checkpoint {folder} is not whole: {wrong}{_instead(folder.parent)}")


def _instead(run: Path) -> str:
    whole, _ = newest_whole(run)
    return f"; the newest whole one is {whole}" if whole else ""


def check_model(folder: str | Path) -> None:
    """ValueError where the files that a model is loaded from are damaged, here or in the folder's ssl/."""
    for place in (Path(folder), Path(folder, "ssl")):
        if place.is_dir() and (wrong := damage(place, _is_model_file)) is not None:
            raise ValueError(f"the model in {place} is not whole: {wrong}{_instead(place.parent)}")


def _is_model_file(name: str) -> bool:
    kinds = ("model", "config.json", "preprocessor_config", "processor_config", "token", "vocab", "merges")
    return os.path.basename(name).startswith(kinds)
