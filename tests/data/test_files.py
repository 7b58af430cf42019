"""Names on disk are bytes: any of them is read, stored and printed, and only regular files are opened."""

import json
import os
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ssl.cli.console import _once, say
from hf_ssl.cli.runfolder import read_run, write_run
from hf_ssl.data import BadImageLedger, SourceError, load_source
from hf_ssl.data.files import (
    NotRegularError,
    check_regular,
    local_path,
    open_regular,
    printable,
    printable_record,
    read_starting,
    read_text,
    storable,
)  # fmt: skip
from hf_ssl.data.stream import RowStream
from hf_ssl.evaluation import raw_pixels

STRANGE = os.fsdecode(b"caf\xe9 \xff.png")


def test_a_strange_name_is_stored_and_printed():
    for path in (f"/tmp/{STRANGE}", "/tmp/plain.png", "/tmp/käse 100%.png"):
        stored = storable(path)
        assert local_path(stored) == path
        assert pa.array([stored]).to_pylist() == [stored]
        printable(path).encode()
    assert storable("a b%20.png") == "a b%20.png" and storable("/tmp/" + STRANGE) == "file:///tmp/caf%E9%20%FF.png"
    assert printable(STRANGE) == r"caf\xe9 \xff.png" and printable("\ud83d") == r"\ud83d"
    assert printable_record({STRANGE: [STRANGE, 1, None]}) == {printable(STRANGE): [printable(STRANGE), 1, None]}


def test_a_folder_of_strange_names_is_data_like_any_other(make, tmp_path, caplog):
    root = os.path.join(str(tmp_path), STRANGE)
    for i, name in enumerate([STRANGE, "b.png", f"x{STRANGE}"]):
        for label in (STRANGE, "dog"):
            folder = os.path.join(root, label)
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, name), "wb") as file:
                file.write(make.png(i) if i < 2 else b"no image")
    with open(os.path.join(root, "dog", STRANGE[:-4] + ".txt"), "w") as file:
        file.write("words")
    source = load_source(root)
    assert source.name == printable(root) and source.dataset.features["label"].names == [r"caf\xe9 \xff.png", "dog"]
    rows = [row for _, row in zip(range(6), RowStream(source, 6, shuffle=False))]
    good = [row for row in rows if "x" not in os.path.basename(source.where(row)).replace(r"\x", "")]
    assert sorted(int(source.decode(row)[0, 0, 0]) for row in good) == [0, 0, 1, 1]
    assert source.where(good[1]) == printable(os.path.join(root, STRANGE, STRANGE))
    captions = [source.captions(row) for row in good if row["caption_file"]]
    assert captions == [["words"]]
    found = raw_pixels(source, progress=False)
    assert len(found) == 4 and len(found.skipped) == 2
    json.dumps(found.skipped, ensure_ascii=False).encode()
    raw_pixels(source, progress=False)
    said = [record.getMessage() for record in caplog.records if "image left out" in record.getMessage()]
    assert len(said) == 2 and printable(f"x{STRANGE}") in said[0]  # however often they are met


@pytest.mark.parametrize("streaming", [False, True])
def test_a_path_column_that_is_not_utf8_is_read(make, tmp_path, streaming):
    make.write(tmp_path / "plain.png", make.png(1))
    with open(os.path.join(str(tmp_path), STRANGE), "wb") as file:
        file.write(make.png(2))
    names = [b"plain.png", os.fsencode(STRANGE), None]
    paths = pa.array(names, pa.binary()).view(pa.string())  # what a writer in another language may leave
    nothing = pa.nulls(3, pa.binary())
    images = pa.StructArray.from_arrays([nothing, paths], ["bytes", "path"], mask=pa.array([False, False, True]))
    pq.write_table(pa.table({"image": images, "note": paths}), tmp_path / "a.parquet")
    source = load_source(str(tmp_path / "*.parquet"), streaming=streaming)
    rows = [row for _, row in zip(range(3), RowStream(source, 3, shuffle=False))]
    assert [int(source.decode(row)[0, 0, 0]) for row in rows[:2]] == [1, 2]
    assert source.where(rows[1]) == printable(STRANGE) and rows[1]["note"] == STRANGE and rows[2]["image"] is None
    if not streaming:
        assert len(raw_pixels(source, progress=False)) == 2


def test_what_is_written_and_said_of_a_strange_name(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, {"dataset": STRANGE})
    assert read_run(tmp_path) == {"dataset": STRANGE}
    (tmp_path / "run.json").read_text(encoding="utf-8")
    say(STRANGE)
    assert capsys.readouterr().out == printable(STRANGE) + "\n"


def test_the_command_line_names_a_broken_image_once(caplog):
    said = set()
    for _ in range(3):
        BadImageLedger().update(["once.png: broken"], 1)  # training, the table, the report
    BadImageLedger().update(["twice.png: broken"], 1)
    shown = [record.getMessage() for record in caplog.records if _once(record, said)]
    assert shown == ["image left out: once.png: broken", "image left out: twice.png: broken"]
    silent = BadImageLedger()
    silent.silent = True
    silent.update(["hush.png: broken"], 1)
    assert silent.distinct == 1 and "hush" not in caplog.text


def test_only_regular_files_are_opened(make, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    here = os.getcwd()
    os.chdir(tmp_path)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
    finally:
        os.chdir(here)
    for name, kind in (("pipe", "a pipe"), ("zero", "a device"), ("socket", "a socket"), ("", "a folder")):
        for read in (open_regular, check_regular, read_text, lambda path: read_starting(path, b"x")):
            with pytest.raises(NotRegularError, match=f"{kind}, not a regular file"):
                read(tmp_path / name)
    make.write(tmp_path / "a", b"abc" * 1000)
    assert read_starting(tmp_path / "a", b"ab") == b"abc" * 1000 and read_starting(tmp_path / "a", b"b") is None


@pytest.mark.parametrize("name", ["a.parquet", "a.tar", "metadata.csv"])
def test_a_pipe_in_a_data_set_is_an_error(make, tmp_path, name):
    os.mkfifo(tmp_path / name)
    if name == "metadata.csv":
        make.write(tmp_path / "a.png", make.png(1))
    with pytest.raises((SourceError, NotRegularError), match="a pipe, not a regular file"):
        load_source(str(tmp_path))
