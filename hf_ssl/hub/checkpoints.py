"""Checkpoints of unknown origin: their tensors, and nothing that they would like to execute.

``torch.load(weights_only=True)`` alone executes nothing either, but a few bytes can still make it fill the memory:
deflated entries, ``bytearray(10**11)``, a million views of one storage. So what a file claims is held against its
size, and its pickle against a short list of harmless names, before anything is loaded; zips are mapped, not read.
"""

import argparse
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..data.files import open_regular

# Structure of a state dict; torch's own list is longer and holds bytearray and codecs, which allocate at will.
_HARMLESS = {
    "collections.OrderedDict", "argparse.Namespace", "torch.Size", "torch.device", "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
    "torch.FloatStorage", "torch.HalfStorage", "torch.BFloat16Storage", "torch.DoubleStorage", "torch.LongStorage",
    "torch.IntStorage", "torch.ShortStorage", "torch.CharStorage", "torch.ByteStorage", "torch.BoolStorage",
    *(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}  # fmt: skip
_LIMIT = 2 << 20  # bytes of pickle; real ones have some hundred kB, and one byte can stand for 70 in memory
_DIRECTORY = 16 << 20  # bytes of a zip's directory or of a safetensors header
_DEPTH, _NAMES = 6, 1 << 18


class CheckpointError(ValueError):
    """A file that cannot or must not be read; one sentence."""


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by dotted name ({"model": {"a.b": …}} is "model.a.b"). others: what is no tensor, name -> its type.
    args: the plain values among the training arguments that official code saves with the weights."""

    tensors: dict[str, Tensor]
    others: dict[str, str]
    args: dict[str, bool | int | float | str]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The tensors of a .pth, .pt or .safetensors file, told by its content; zip files are mapped, not copied.

    Raises CheckpointError for anything that is no checkpoint, claims more than it holds or needs code to run.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            start = file.read(10)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    with _sentences(path):
        if start[:4] == b"PK\3\4":
            _check_zip(path)
            found = _load(path, mmap=True)
        elif start[8:9] == b"{" or path.suffix == ".safetensors":
            found = _load_safetensors(path)
        else:  # as torch saved before 1.6
            _check_legacy(path)
            found = _load(path, mmap=False)
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} holds a {type(found).__name__}, not a dict of tensors.")
        checkpoint = _flatten(path, found)
        _check_sizes(path, checkpoint.tensors)
    return checkpoint


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # unpickling a broken file raises whatever its bytes happen to ask for
        words = " ".join(str(error).split()) or type(error).__name__
        kinds = "neither a sound .pth or .pt file of torch.save nor a .safetensors file"
        raise CheckpointError(f"{path} is {kinds}: {words[:200]}") from None


def _load(path: Path, mmap: bool) -> Any:
    # argparse.Namespace (official DINO and MAE files hold one) only receives attributes: nothing runs
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


# --- what a file claims, before it is loaded ----------------------------------------------------------------------


def _check_zip(path: Path) -> None:
    """Every entry stored as it is, all of them within the file, one pickle, and harmless."""
    size = path.stat().st_size
    _check_directory(path, size)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename.lower() for entry in entries]  # torch looks them up without regard to case
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError(f"{path} is a TorchScript program: it holds code, which convert never executes.")
        claimed = sum(entry.file_size for entry in entries)
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise CheckpointError(
                f"{path} is a compressed zip of {size:,} bytes that claims to unpack to {claimed:,}; torch.save never "
                "compresses. If you trust it, unpack it and save its weights again."
            )
        if claimed > size:
            raise CheckpointError(f"{path} has {size:,} bytes but its entries claim {claimed:,}.")
        root = names[0].partition("/")[0]
        if len(set(names)) != len(names) or any(name.partition("/")[0] != root for name in names):
            raise CheckpointError(f"{path} is no file of torch.save: its entries share a name or no folder.")
        if f"{root}/data.pkl" not in names:
            raise CheckpointError(f"{path} is a zip, but no file of torch.save: it has no data.pkl.")
        entry = entries[names.index(f"{root}/data.pkl")]
        if entry.file_size > _LIMIT:
            raise _too_long(path)
        with archive.open(entry) as file:
            _check_pickle(path, file)


def _check_directory(path: Path, size: int) -> None:
    """The zip's directory lies right before its end, where every reader finds the same one, and is not huge."""
    with path.open("rb") as file:
        file.seek(max(0, size - 98))
        tail = file.read()
    end = tail[-22:]
    if len(end) < 22 or end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
        raise CheckpointError(f"{path} is cut short or has something behind its end: its zip directory is missing.")
    count, length, offset = struct.unpack("<HLL", end[10:20])
    place = size - 22
    if tail[-42:-38] == b"PK\6\7":  # zip64: its values must say the same, except where 32 bits cannot
        place, record = size - 98, tail[:56]
        if len(tail) < 98 or record[:4] != b"PK\6\6" or struct.unpack("<Q", tail[-34:-26])[0] != place:
            raise CheckpointError(f"{path} is no file of torch.save: its zip directory points elsewhere.")
        wide = struct.unpack("<QQQ", record[32:56])
        if any(b not in (a, limit) for a, b, limit in zip(wide, (count, length, offset), (0xFFFF, *[0xFFFFFFFF] * 2))):
            raise CheckpointError(f"{path} has two zip directories that contradict each other.")
        count, length, offset = wide
    if offset + length != place or length > _DIRECTORY or count == 0:
        raise CheckpointError(f"{path} claims a zip directory of {length:,} bytes that is not there, or is absurd.")


def _check_legacy(path: Path) -> None:
    """Magic number, protocol, system, object and storage keys: five pickles in a row, then the bare storages."""
    with path.open("rb") as file:
        for _ in range(5):
            _check_pickle(path, file)


def _check_pickle(path: Path, file: BinaryIO | Any) -> None:
    """Reads the opcodes without obeying them; refuses every name that is not part of a state dict."""
    wanted = set()
    texts = ["?", "?"]  # the last two: a newer pickle's STACK_GLOBAL takes its module and name from them
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            wanted.add(str(argument).replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            wanted.add(".".join(texts) + " ")  # never a harmless name: it need not be what is called
        elif opcode.name.startswith("EXT"):
            wanted.add(f"extension {argument}")
        elif isinstance(argument, str):
            texts = [texts[1], argument]
        if (position or 0) > _LIMIT:
            raise _too_long(path)
    refused = sorted(wanted - _HARMLESS)
    if refused:
        listed = ", ".join(repr(name[:80].strip())[1:-1] for name in refused[:5])
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise CheckpointError(
            f"{path} wants to execute {listed}{more} while it is loaded; nothing was executed. If you trust it, load "
            "it where that is safe and save its state dict alone."
        )


def _too_long(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} holds a pickle of more than {_LIMIT >> 20} MB: no state dict needs that.")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, _DIRECTORY):
        raise CheckpointError(f"{path} has {size:,} bytes but its header claims {length:,}: it lies or is cut short.")
    try:
        return load_file(path)  # checks shapes and offsets against each other and the size
    except SafetensorError as error:
        raise CheckpointError(f"{path} has a header that does not fit its {size:,} bytes: {error}") from None


# --- what was loaded ----------------------------------------------------------------------------------------------


def _flatten(path: Path, found: dict) -> Checkpoint:
    checkpoint = Checkpoint({}, {}, {})
    seen = 0
    todo: list[tuple[str, dict, int]] = [("", found, 0)]
    while todo:
        prefix, group, depth = todo.pop()
        for key, value in group.items():
            seen += 1
            name = f"{prefix}{key}" if isinstance(key, (str, int)) else ""
            if not name or len(name) > 300 or not name.isprintable() or seen > _NAMES:
                raise CheckpointError(f"{path} has names that no model has, or more than {_NAMES:,} of them.")
            if isinstance(value, Tensor):
                checkpoint.tensors[name] = value
            elif name in ("args", "config") and isinstance(values := getattr(value, "__dict__", value), dict):
                plain = {
                    k: v for k, v in values.items() if isinstance(k, str) and isinstance(v, (bool, int, float, str))
                }
                checkpoint.args.update(plain)
                checkpoint.others[name] = type(value).__name__
            elif isinstance(value, dict) and depth < _DEPTH and all(isinstance(k, str) for k in value):
                todo.append((f"{name}.", value, depth + 1))
            else:
                checkpoint.others[name] = type(value).__name__
    return checkpoint


def _check_sizes(path: Path, tensors: dict[str, Tensor]) -> None:
    """No tensor larger than its storage (a stride of 0), and all together no larger than twice the file."""
    size, total = path.stat().st_size, 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name} is no dense tensor.")
        total += tensor.nbytes
        if tensor.nbytes > tensor.untyped_storage().nbytes() or total > 2 * size + (1 << 20):
            raise CheckpointError(f"{path} has {size:,} bytes but {name} claims {tensor.nbytes:,}, {total:,} so far.")
