"""Hostile and broken checkpoints: refused in a sentence, nothing executed, the whole process below 1 GB."""

import argparse
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_ssl.hub import CheckpointError, read_checkpoint
from tests import PATIENCE

ROOT = Path(__file__).parents[2]
# One process converts every file, as the command line does; the peak of its memory counts from each file's start.
_CONVERT = """
import contextlib, io, json, sys
from pathlib import Path
from hf_ssl.cli import main

found = {}
for file in sorted(Path(sys.argv[1]).iterdir()):
    open("/proc/self/clear_refs", "w").write("5")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["convert", str(file), "--output", sys.argv[2]])
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    found[file.stem] = [code, said.getvalue(), int(peak.split()[1]) // 1024]
print(json.dumps(found))
"""


class Run:
    """Executes its command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def archive(entries: list[tuple[str, bytes, int, int]], comment: bytes = b"") -> bytes:
    """A zip by hand: (name, bytes as they lie in it, method, size that it claims to unpack to)."""
    out, directory = io.BytesIO(), b""
    for name, data, method, claimed in entries:
        start, small = out.tell(), min(claimed, 0xFFFFFFFE)
        common = struct.pack("<HHHHHLLLHH", 20, 0, method, 0, 0, zlib.crc32(data), len(data), small, len(name), 0)
        out.write(b"PK\3\4" + common + name.encode() + data)
        directory += (
            b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHLL", 0, 0, 0, 0, start) + name.encode()
        )
    place = out.tell()
    counts = struct.pack("<HHHHLLH", 0, 0, len(entries), len(entries), len(directory), place, len(comment))
    return out.getvalue() + directory + b"PK\5\6" + counts + comment


def torch_zip(pickled: bytes, **records: bytes) -> bytes:
    """A file of torch.save with this pickle; nothing in it is compressed."""
    entries = {"x/data.pkl": pickled, "x/byteorder": b"little", "x/version": b"3\n"}
    entries |= {f"x/data/{name.strip('_')}": data for name, data in records.items()}
    return archive([(name, data, 0, len(data)) for name, data in entries.items()])


def called(function: str, argument: str) -> bytes:
    """A protocol-2 pickle of {"a": function(argument)}; argument is pickle code."""
    return b"\x80\x02}X\x01\x00\x00\x00ac" + function.encode() + b"\n" + argument.encode("latin1") + b"\x85Rs."


def tensor(stored: int, shown: int, *view: None) -> bytes:
    """A pickle of {"a": a vector of ``shown`` floats} whose storage claims ``stored``."""

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", stored, *view) if value == "here" else None

    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, ("here", 0, (shown,), (1,), False, {})

    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"a": Rebuilt()})
    return out.getvalue()


def legacy(stored: int, shown: int) -> bytes:
    """A file as torch saved before 1.6: four pickles, the storages' keys, and 16 bytes that claim to be ``stored``."""
    start = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return start + tensor(stored, shown, None) + pickle.dumps(["0"], 2) + struct.pack("<q", stored) + bytes(16)


def safetensors(header: Any, length: int | None = None, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def wide_vit(patch: int, depth: int, name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Names of a ViT that would take 12 M parameters a block; the first has one matrix, the others next to nothing."""
    found = {"cls_token": torch.zeros(1, 1, 1024), "pos_embed": torch.zeros(1, 197, 1024)}
    found |= {f"blocks.{i}.{name}": torch.zeros(1) for i in range(depth)}
    found["blocks.0.mlp.fc1.weight"] = torch.zeros(4096, 1024)
    return found | {
        "patch_embed.proj.weight": torch.zeros(1024, 1, patch, patch),
        f"blocks.0.{name}": torch.zeros(shape),
    }


def hostile(folder: Path, marker: Path) -> dict[str, str]:
    """Writes the files; name -> what the refusal must say."""
    run, zeros = Run(f"touch {marker}"), zlib.compressobj(9, zlib.DEFLATED, -15)
    block = zeros.compress(bytes(1 << 20)) + zeros.flush(zlib.Z_FULL_FLUSH)
    bomb = block * 4096 + zeros.flush()  # 4 GB
    good = io.BytesIO()
    torch.save({"a": torch.ones(3)}, good)
    shared = torch.zeros(1 << 20)
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    made: dict[str, tuple[Any, str]] = {
        "code.pth": (run, "wants to execute posix.system .* nothing was executed"),
        "code_legacy.pth": (run, "wants to execute posix.system"),
        "code_nested.pt": ({"state_dict": {"a": torch.ones(2), "b": [run]}}, "wants to execute posix.system"),
        "code_pickle4.pth": (pickle.dumps(run), "wants to execute posix.system"),
        "code_pickle0.pth": (pickle.dumps(run, protocol=0), "wants to execute posix.system"),
        "code_inst.pth": (b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n.", "wants to execute os.system"),
        "code_module.pth": (nn_module(), "wants to execute .*torch.nn.modules.linear.Linear"),
        "code_eval.pth": (torch_zip(called("__builtin__\neval", "X\x03\x00\x00\x001+1")), "__builtin__.eval"),
        "script.pt": (torch.jit.script(nn_module()), "TorchScript program"),
        "bomb_deflated.pth": (
            archive([("x/data.pkl", pickle.dumps({}, 2), 0, 4), ("x/data/0", bomb, 8, 1 << 32)]),
            "compressed zip of .* claims to unpack to",
        ),
        "bomb_pickle.pth": (archive([("x/data.pkl", bomb, 8, 1 << 32)]), "compressed zip"),
        "bomb_claim.pth": (archive([("x/data.pkl", b"}.", 0, 1 << 31)]), "entries claim 2,147,483,648"),
        "bomb_bytearray.pth": (torch_zip(called("builtins\nbytearray", "J\x00\x00\x00\x7f")), "builtins.bytearray"),
        "bomb_codec.pth": (torch_zip(called("_codecs\nencode", "X\x01\x00\x00\x00a")), "_codecs.encode"),
        "bomb_dicts.pth": (torch_zip(b"\x80\x02" + b"}" * (32 << 20) + b"."), "pickle of more than 2 MB"),
        "bomb_dicts_legacy.pth": (b"\x80\x02" + b"}" * (32 << 20) + b".", "pickle of more than 2 MB"),
        "bomb_stride.pth": ({"a": torch.zeros(1).expand(1 << 40)}, "a claims 4,398,046,511,104"),
        "bomb_views.pth": ({f"a{i}": shared for i in range(3000)}, "claims 4,194,304"),
        "bomb_depth.pth": (wide_vit(16, 400, "mlp.fc1.weight", (4096, 1024)), "is missing"),
        "bomb_deeper.pth": (wide_vit(16, 4000, "norm1.weight", (1,)), "4000 blocks"),
        "bomb_pixels.pth": (wide_vit(160, 1, "mlp.fc1.weight", (4096, 1024)), "2240x2240 pixels"),
        "lie_storage.pth": (torch_zip(tensor(1 << 40, 4), _0=bytes(16)), None),
        "lie_tensor.pth": (torch_zip(tensor(4, 1 << 40), _0=bytes(16)), "neither a sound .* storage"),
        "lie_legacy.pth": (legacy(1 << 29, 1 << 29), "expected 2147483632 more bytes"),
        "lie_legacy_tensor.pth": (legacy(4, 1 << 29), "neither a sound"),
        "lie_directory.pth": (good.getvalue()[:-22] + b"PK\5\6" + bytes(8) + b"\xff" * 8 + bytes(2), "zip director"),
        "lie_comment.pth": (archive([("x/data.pkl", b"}.", 0, 2)], b"PK\5\6"), "its zip directory is missing"),
        "lie_twice.pth": (archive([(name, b"}.", 0, 2) for name in ("x/data.pkl", "X/DATA.PKL")]), "share a name"),
        "lie_header.safetensors": (safetensors({"a": entry}, length=1 << 60), "header claims 1,152,921,504"),
        "lie_offsets.safetensors": (safetensors({"a": entry | {"data_offsets": [0, 1 << 40]}}), "does not fit its"),
        "lie_shape.safetensors": (safetensors({"a": entry | {"shape": [1 << 40]}}), "does not fit its"),
        "lie_overflow.safetensors": (safetensors({"a": entry | {"shape": [1 << 62, 1 << 62]}}), "does not fit its"),
        "lie_json.safetensors": (safetensors(b"{" * 100), "does not fit its"),
        "cut.pth": (good.getvalue()[:-30], "cut short"),
        "cut_legacy.pth": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02", "neither a sound"),
        "cut.safetensors": (safetensors({"a": entry}, data=b"\0"), "does not fit its"),
        "empty.pth": (b"", "neither a sound"),
        "noise.pth": (bytes(range(256)) * 40, "neither a sound"),
        "escape.pth": ({"a\x1b[2J": torch.ones(1)}, "names that no model has"),
        "object.pth": (torch.ones(3), "holds a Tensor, not a dict"),
    }  # fmt: skip
    for name, (content, _) in made.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif isinstance(content, torch.jit.ScriptModule):
            torch.jit.save(content, folder / name)
        else:
            torch.save(content, folder / name, _use_new_zipfile_serialization="legacy" not in name)
    return {Path(name).stem: words for name, (_, words) in made.items()}


def nn_module() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


def test_hostile_files_are_refused_within_a_gigabyte(tmp_path: Path) -> None:
    files, marker = tmp_path / "files", tmp_path / "executed"
    files.mkdir()
    wanted = hostile(files, marker)
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(files), str(tmp_path / "out")],
        capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(wanted)
    for name, (code, said, peak) in found.items():
        assert code == 1 and said.count("\n") == 1 and "Traceback" not in said, f"{name}: {code} {said}"
        assert wanted[name] is None or re.search(wanted[name], said), f"{name}: {said}"
        assert peak < 1000, f"{name}: {peak} MB"
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_what_is_harmless_is_read(tmp_path: Path) -> None:
    """Both formats of torch.save and safetensors give the same tensors; views of one storage stay views."""
    base = torch.arange(12.0).view(3, 4)
    weights = {"a.weight": base, "a.row": base[1], "b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    whole = {
        "model": weights,
        "args": argparse.Namespace(lr=0.1, data="/datasets/secret", device=torch.device("cuda"), sizes=[1, 2]),
        "optimizer": {"state": {0: {"step": torch.ones(1)}}},
        "epoch": 3,
    }
    torch.save(whole, tmp_path / "new.pth")
    torch.save(whole, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    save_file({name: t.clone() for name, t in weights.items()}, tmp_path / "flat.safetensors")
    for file, prefix in (("new.pth", "model."), ("old.pth.tar", "model."), ("flat.safetensors", "")):
        read = read_checkpoint(tmp_path / file)
        assert set(read.tensors) == {f"{prefix}{name}" for name in weights}
        assert all(torch.equal(read.tensors[f"{prefix}{name}"], t) for name, t in weights.items())
        if prefix:
            assert read.args == {"lr": 0.1, "data": "/datasets/secret"}
            assert read.others == {"args": "Namespace", "optimizer.state": "dict", "epoch": "int"}


def test_a_parameter_and_an_ordered_dict_are_harmless(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    torch.save({"state": module.state_dict(), "w": module.weight}, tmp_path / "module.pth")
    assert set(read_checkpoint(tmp_path / "module.pth").tensors) == {"state.weight", "state.bias", "w"}


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a folder, not a regular file"):
        read_checkpoint(tmp_path)
