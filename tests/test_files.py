"""A file or folder is there whole or as it was: errors, full disks, Ctrl-C and SIGTERM at every moment."""

import errno
import os
import signal
from pathlib import Path

import pytest

from hf_ssl.files import WriteError, whole_file, whole_folder


def tree(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path: Path) -> None:
    path, link = tmp_path / "a.npz", tmp_path / "link.npz"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    with whole_file(link) as scratch:
        assert scratch.suffix == ".npz" and scratch.parent == tmp_path  # numpy adds a suffix that is missing
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert tree(tmp_path) == {"a.npz": "new", "link.npz": "new"}
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    with whole_file("/dev/null") as device:
        device.write_text("away")
    assert not Path("/dev/null").is_file()


class Rust(Exception):
    """As tokenizers and safetensors say it."""


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            WriteError,
            "the disk is full; what was there before is un",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), WriteError, "Permission denied; what was there before"),
        (Rust("I/O error: No space left on device (os error 28)"), WriteError, "the disk is full"),
        (ValueError("not about writing"), ValueError, "^not about writing$"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_what_was_there_stays_where_writing_fails(tmp_path: Path, whole, error, raised, words: str) -> None:
    for path in (tmp_path / "old", tmp_path / "new" / "er"):
        if path.name == "old":
            (path if whole is whole_file else path / "config.json").parent.mkdir(exist_ok=True)
            (path if whole is whole_file else path / "config.json").write_text("old")
        else:
            words = words.replace("what was there before is un", "nothing was left there").replace(
                "what was there before", "nothing was left there"
            )
        (tmp_path / "new").mkdir(exist_ok=True)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(raised, match=words), whole(path) as scratch:
            (scratch if whole is whole_file else scratch / "config.json").write_text("half")
            raise error
        assert sorted(tmp_path.rglob("*")) == before and tree(tmp_path).keys() <= {"old", "old/config.json"}
        assert set(tree(tmp_path).values()) == {"old"}


def test_a_disk_that_says_only_at_the_end_that_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    for whole, path in ((whole_file, tmp_path / "a.txt"), (whole_folder, tmp_path / "x" / "y")):
        with pytest.raises(WriteError, match="the disk is full") as caught, whole(path) as scratch:
            (scratch if whole is whole_file else scratch / "b.txt").write_text("new")
        assert caught.value.errno == errno.ENOSPC
    assert tree(tmp_path) == {"a.txt": "old"} and list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_no_folder_and_no_permission_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=f"there is no folder {tmp_path}/gone"), whole_file(tmp_path / "gone" / "a"):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="cannot be written"), whole_folder(tmp_path / "file" / "a"):
        pass


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_sigterm_while_writing_leaves_nothing_behind(tmp_path: Path, whole) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(SystemExit, match="143"), whole(tmp_path / "a") as scratch:
        (scratch if whole is whole_file else scratch / "b").write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


OLD = {
    "config.json": "old", "model.safetensors": "old", "model-00001.safetensors": "old", "ssl/config.json": "old",
    "ssl/model.safetensors": "old", "run.json": "mine", "checkpoint-1/model.safetensors": "mine",
}  # fmt: skip
NEW = {
    name: "new" for name in ("model.safetensors", "ssl/config.json", "config.json", "ssl/model.safetensors", "a.txt")
}
AFTER = {**NEW, "run.json": "mine", "checkpoint-1/model.safetensors": "mine"}
STALE = ("model*.safetensors", "ssl/model*.safetensors")


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def replace_folder(folder: Path) -> None:
    with whole_folder(folder, STALE) as scratch:
        write(scratch, NEW)


def loads_half(folder: Path) -> bool:
    """Whether root or ssl/ can be loaded and is a mixture of old and new."""
    return any(
        (part / "config.json").exists()
        and len({file.read_text() for file in part.glob("*") if file.suffix in (".json", ".safetensors")} - {"mine"})
        > 1
        for part in (folder, folder / "ssl")
    )


def test_a_folder_takes_the_new_files_keeps_others_and_drops_stale_weights(tmp_path: Path) -> None:
    write(tmp_path / "run", OLD)
    replace_folder(tmp_path / "run")
    assert tree(tmp_path / "run") == AFTER
    replace_folder(tmp_path / "deep" / "new")
    assert tree(tmp_path / "deep" / "new") == NEW
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_error_at_any_move_puts_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error) -> None:
    real, calls = Path.replace, [0]

    def replace(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == fails:
            raise error
        moved = real(self, target)
        assert not loads_half(tmp_path / "run"), f"after move {calls[0]}"
        return moved

    monkeypatch.setattr(Path, "replace", replace)
    for fails in range(1, 30):
        calls[0] = 0
        write(tmp_path / "run", OLD)
        before = tree(tmp_path)
        try:
            replace_folder(tmp_path / "run")
        except (WriteError, KeyboardInterrupt):
            assert tree(tmp_path) == before, fails
        else:
            break
    assert fails == 11 and tree(tmp_path / "run") == AFTER  # 5 old files go, 5 new ones come
