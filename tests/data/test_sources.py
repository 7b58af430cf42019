"""Each kind of dataset opens by one name, undecoded, with labels and splits; what cannot says what is there."""

import errno
import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ssl.data import BadImageError, SourceError, load_source
from hf_ssl.data.files import Home, OutsideError, resolved
from hf_ssl.data.local import FASHION_MNIST
from hf_ssl.data.stream import RowStream


def reds(source, count=None):
    """The red value of every picture: which images there are, in which order."""
    rows = [source.dataset[i] for i in range(len(source.dataset))] if not source.is_stream else source.dataset
    return [int(source.decode(row)[0, 0, 0]) for row in rows]


def test_built_in_sets():
    emoji, placed = load_source("emoji", "test"), load_source("emoji:placed", "test")
    row = emoji.dataset[0]
    assert emoji.labels == placed.labels == ("group", "subgroup") and set(emoji.labels) <= set(row)
    assert emoji.decode(row).shape == (64, 64, 4)  # alpha is kept, for the mask and the placing
    alpha = emoji.decode(row)[..., 3]
    assert (emoji.image(row, 0)[alpha == 0] == 255).all() and emoji.image(row, 0).shape == (64, 64, 3)
    assert not np.array_equal(placed.image(row, 0), placed.image(row, 1))
    np.testing.assert_array_equal(placed.image(row, 1), placed.image(row, 1))
    assert len(load_source("emoji", "train")) + len(emoji) == len(load_source("emoji", "all"))


def test_fashion_mnist(monkeypatch, tmp_path):
    if FASHION_MNIST.is_dir():
        source = load_source("fashion-mnist", "test")
        assert len(source) == 10_000 and source.channels == 1 and source.labels == ("label",)
        assert source.decode(source.dataset[0]).shape == (28, 28, 1)
        assert np.bincount(source.dataset["label"]).tolist() == [1000] * 10
        assert source.dataset.features["label"].int2str(source.dataset[0]["label"]) == "Ankle-boot"
    monkeypatch.setattr("hf_ssl.data.local.FASHION_MNIST", tmp_path)
    with pytest.raises(SourceError, match="apt-get install dataset-fashion-mnist"):
        load_source("fashion-mnist")


def test_folder_of_images_is_sorted_and_opens_none(make, tmp_path):
    for name, data in {
        "b.PNG": make.png(2), "a.jpeg": b"", "deep/er/c.png": make.png(3), "d.webp": b"no image", ".hidden.png": b"",
        "notes.txt": b"x",
        "__MACOSX/a.png": b"",
    }.items():  # fmt: skip
        make.write(tmp_path / "set" / name, data)
    (tmp_path / "set" / "deep" / "loop").symlink_to(tmp_path / "set")
    source = load_source(str(tmp_path / "set"))
    names = [row["image"]["path"].rpartition("set/")[2] for row in source.dataset]
    assert names == ["a.jpeg", "b.PNG", "d.webp", "deep/er/c.png"]
    assert source.labels == () and len(source) == 4
    for row, reason in ((source.dataset[0], "empty"), (source.dataset[2], "no image format")):
        with pytest.raises(BadImageError, match=f"{row['image']['path']}.*{reason}"):
            source.decode(row)


def test_class_folders_give_labels_and_split_folders_splits(make, tmp_path):
    for i, name in enumerate(
        ["train/dog/1.png", "train/cat/2.png", "train/ant/3.png", "val/dog/4.png", "val/cat/5.png"]
    ):
        make.write(tmp_path / name, make.png(i))
    train, val = load_source(str(tmp_path)), load_source(str(tmp_path), "validation")
    assert train.dataset.features["label"].names == val.dataset.features["label"].names == ["ant", "cat", "dog"]
    assert (train.dataset["label"][:], reds(train)) == ([0, 1, 2], [2, 1, 0])
    assert (val.dataset["label"][:], reds(val), val.labels) == ([1, 2], [4, 3], ("label",))
    with pytest.raises(SourceError, match="no split 'test'; it has train, val"):
        load_source(str(tmp_path), "test")
    # without the split folders: classes; a class called train is one
    vehicles = tmp_path / "vehicles"
    for name in ("bus/1.png", "train/2.png", "plane/3.png"):
        make.write(vehicles / name, make.png(1))
    assert load_source(str(vehicles)).dataset.features["label"].names == ["bus", "plane", "train"]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(make, tmp_path, streaming):
    make.write_parquet(tmp_path / "b.parquet", range(10, 15), label=[0, 1, 0, 1, 2])
    make.write_parquet(tmp_path / "a.parquet", range(10), label=[1] * 10)
    for spec in (str(tmp_path / "*.parquet"), str(tmp_path)):
        source = load_source(spec, streaming=streaming)
        assert source.is_stream is streaming and len(source) == 15 and source.labels == ("label",)
        assert reds(source) == list(range(15))
    rows = list(zip(range(15), RowStream(source, 15, shuffle=False)))
    assert [row["_index"] for _, row in rows] == [row["image"]["path"] == f"{i}.png" and i for i, row in rows]
    place = f"row 2 of {tmp_path}/b.parquet" if streaming else f"row 12 of {tmp_path}"
    assert source.where(rows[12][1]) == f"12.png ({place})"
    assert RowStream(source, 4, world_size=2).steps_per_epoch == 1
    make.write(tmp_path / "c.parquet", b"PAR1 no")
    with pytest.raises(SourceError, match=r"c.parquet is not a parquet file"):
        load_source(str(tmp_path), streaming=streaming)


def test_splits_by_file_name(make, tmp_path):
    make.write_parquet(tmp_path / "train-00000-of-00002.parquet", [1, 2])
    make.write_parquet(tmp_path / "train-00001-of-00002.parquet", [3])
    make.write_parquet(tmp_path / "test-00000-of-00001.parquet", [4])
    assert reds(load_source(str(tmp_path))) == [1, 2, 3]
    assert reds(load_source(str(tmp_path), "test")) == [4]
    assert reds(load_source(str(tmp_path / "test*.parquet"))) == [4]  # one kind only: no splits, all of it
    with pytest.raises(SourceError, match="no split 'validation'; it has test, train"):
        load_source(str(tmp_path), "validation")


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset(make, tmp_path, streaming):
    for i in range(2):
        make.write_tar(tmp_path / f"{i}.tar", range(5 * i, 5 * i + 5))
    source = load_source(str(tmp_path / "*.tar"), streaming=streaming)
    assert source.labels == ("cls",) and reds(source) == list(range(10))
    row = next(iter(RowStream(source, 2, shuffle=False)))
    assert row["image"]["path"] == "0000.png" and row["cls"] == 0
    if streaming:
        with pytest.raises(TypeError, match="does not say how many"):
            len(source)
        assert source.num_rows is None and RowStream(source, 2).steps_per_epoch is None
        assert source.where(row).startswith("0000.png (row 0 in shard 0 of")


def test_columns_are_found_or_listed(make, tmp_path):
    spec = make.write_parquet(tmp_path / "a.parquet", [7], column="photo", weight=[1])
    assert reds(load_source(spec)) == [7] and "photo" not in load_source(spec).dataset.features
    assert load_source(spec, label_column="weight").labels == ("weight",)
    for name, message in (
        ("image_column", "no column 'nope'; its columns are photo, weight"),
        ("label_column", "no column"),
    ):
        with pytest.raises(SourceError, match=message):
            load_source(spec, **{name: "nope"})
    struct = tmp_path / "struct.parquet"
    pq.write_table(pa.table({"picture": [{"bytes": make.png(5), "path": "x"}], "img": [1]}), struct)  # no metadata
    for streaming in (False, True):
        assert reds(load_source(str(struct), streaming=streaming)) == [5]
    raw = tmp_path / "raw.parquet"
    pq.write_table(pa.table({"jpg": [make.png(6)], "text": ["a"]}), raw)
    assert [reds(load_source(str(raw), streaming=s)) for s in (False, True)] == [[6], [6]]
    none = tmp_path / "none.parquet"
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), none)
    with pytest.raises(SourceError, match=r"no image column; its columns are text, id. Name the one .* image_column"):
        load_source(str(none))
    two = tmp_path / "two.parquet"
    images = datasets.Features(left=datasets.Image(), right=datasets.Image())
    pair = {"left": [{"bytes": make.png(1), "path": None}], "right": [{"bytes": make.png(2), "path": None}]}
    datasets.Dataset.from_dict(pair, features=images).to_parquet(str(two))
    with pytest.raises(SourceError, match="several image columns"):
        load_source(str(two))
    for streaming in (False, True):
        source = load_source(str(two), streaming=streaming, image_column="right")
        assert reds(source) == [2] and decoded_stream(source) == [2]


def decoded_stream(source):
    return [int(source.decode(row)[0, 0, 0]) for _, row in zip(range(1), RowStream(source, 1))]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["Array3D", "channels first", "lists"])
def test_array_columns_of_13_bands(tmp_path, streaming, kind):
    bands = (np.arange(2 * 20 * 18 * 13).reshape(2, 20, 18, 13) * 257 % 65536).astype(np.uint16)
    stored = bands.transpose(0, 3, 1, 2) if kind == "channels first" else bands
    feature = datasets.List(datasets.List(datasets.List(datasets.Value("uint16"))))
    if kind != "lists":
        feature = datasets.Array3D(shape=stored.shape[1:], dtype="uint16")
    data = datasets.Dataset.from_dict({"image": list(stored)}, features=datasets.Features(image=feature))
    data.to_parquet(str(tmp_path / "a.parquet"))
    source = load_source(str(tmp_path / "a.parquet"), streaming=streaming)
    assert source.channels == 13
    rows = list(source.dataset) + [row for _, row in zip(range(2), RowStream(source, 1, shuffle=False))]
    for row, wanted in zip(rows, [*bands, *bands]):
        np.testing.assert_array_equal(source.decode(row), (wanted.astype(int) + 128) // 257)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("others", [["other"], ["other", "image"]])
def test_a_shard_without_the_images_is_an_error(make, tmp_path, others, streaming):
    """20 of 40 rows were read as nothing, or as 20 broken images."""
    make.write_parquet(tmp_path / "a.parquet", range(20), **({"other": [1] * 20} if "image" in others else {}))
    pq.write_table(pa.table({"other": list(range(20))}), tmp_path / "b.parquet")
    with pytest.raises(
        SourceError, match=r"b.parquet has (no column 'image'|the columns other, and .*a.parquet has image)"
    ):
        load_source(str(tmp_path), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_in_another_order_with_gaps_or_without_rows(make, tmp_path, streaming, caplog):
    make.write_parquet(tmp_path / "a.parquet", range(4), label=[1] * 4, weight=[2] * 4)
    turned = pq.read_table(tmp_path / "a.parquet").select(["weight", "image"])
    pq.write_table(turned, tmp_path / "b.parquet")
    pq.write_table(turned.slice(0, 0), tmp_path / "c.parquet")
    source = load_source(str(tmp_path), streaming=streaming)
    assert "b.parquet has no column 'label', which other files have: its rows hold nothing there" in caplog.text
    rows = [row for _, row in zip(range(8), RowStream(source, 8, shuffle=False, columns=("label", "weight")))]
    assert [int(source.decode(row)[0, 0, 0]) for row in rows] == [*range(4)] * 2 and len(source) == 8
    assert [row["label"] for row in rows] == [1] * 4 + [None] * 4 and {row["weight"] for row in rows} == {2}
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(SourceError, match="holds no rows"):
        load_source(str(tmp_path), streaming=streaming)


def test_a_folder_of_two_kinds_of_data_asks_which(make, tmp_path):
    make.write(tmp_path / "a.png", make.png(1))
    make.write_parquet(tmp_path / "b.parquet", [2])
    with pytest.raises(SourceError, match=r"holds 1 image file\(s\) and 1 .parquet file\(s\), and one kind is read"):
        load_source(str(tmp_path))
    assert reds(load_source(str(tmp_path / "*.png"))) == [1] and reds(load_source(str(tmp_path / "*.parquet"))) == [2]


def test_images_that_metadata_promise_are_counted_where_they_are_missing(make, tmp_path, caplog):
    for name in ("a.png", "deep/b.png"):
        make.write(tmp_path / name, make.png(1))
    lines = ["file_name,words", "a.png,x", "gone.png,y", "deep/gone.jpg,y", "notes.pdf,z"]
    make.write(tmp_path / "metadata.csv", "\n".join(lines).encode())
    source = load_source(str(tmp_path))
    assert source.missing == tuple(
        f"{tmp_path}/{name}: the metadata name it, and there is no such file" for name in ("gone.png", "deep/gone.jpg")
    )
    assert "the metadata name 1 file(s) that are no images, such as notes.pdf" in caplog.text
    for wrong, words in (("a.png,again", "line 6 names a.png again"), ("../b.png,x", "outside of the folder")):
        make.write(tmp_path / "metadata.csv", "\n".join([*lines, wrong]).encode())
        with pytest.raises(SourceError, match=words):
            load_source(str(tmp_path))


def test_a_folder_that_cannot_be_read_is_an_error(make, tmp_path, monkeypatch):
    make.write(tmp_path / "a.png", make.png(1))
    make.write(tmp_path / "locked" / "b.png", make.png(2))
    (tmp_path / "locked").chmod(0)
    if os.geteuid() == 0:  # whom no mode stops
        monkeypatch.setattr(
            "os.scandir", lambda path, scan=os.scandir: scan(path) if "locked" not in path else denied(path)
        )
    try:
        with pytest.raises(SourceError, match=r"The folder .*locked cannot be read \(Permission denied\)"):
            load_source(str(tmp_path))
    finally:
        (tmp_path / "locked").chmod(0o700)


def denied(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def test_a_folder_that_is_linked_twice_is_read_once_and_said(make, tmp_path, caplog):
    make.write(tmp_path / "z" / "a.png", make.png(1))
    (tmp_path / "b").symlink_to("z")
    (tmp_path / "z" / "circle").symlink_to(tmp_path)
    source = load_source(str(tmp_path))
    assert [row["image"]["path"] for row in source.dataset] == [f"{tmp_path}/z/a.png"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/b is a link to {tmp_path}/z, which is read already: it is left out."
    ]


def test_a_glob_of_images_is_a_folder_of_them(make, tmp_path, monkeypatch):
    for i, name in enumerate(["dog/a.png", "cat/b.png", "cat/c.jpg", "cat/deep/d.png", "cat/.e.png", "cow/f.PNG"]):
        make.write(tmp_path / name, make.png(i))
    make.write(tmp_path / "cat" / "b.txt", b"a cat")
    make.write(tmp_path / "metadata.csv", b"file_name,weight\ndog/a.png,7\nnone.png,8\n")
    (tmp_path / "cat" / "loop").symlink_to(tmp_path)
    (tmp_path / "dog" / "loop").symlink_to(tmp_path)

    def found(pattern):
        source = load_source(str(tmp_path / pattern))
        return [row["image"]["path"].removeprefix(f"{tmp_path}/") for row in source.dataset], source

    names, source = found("*/*.png")
    assert names == ["cat/b.png", "dog/a.png"] and source.missing == ()
    assert source.dataset.features["label"].names == ["cat", "dog"] and source.dataset["weight"][:] == [None, 7]
    assert source.captions(source.dataset[0]) == ["a cat"]
    assert found("cat/*.png")[0] == ["cat/b.png"]
    assert found("**/*.png")[0] == ["cat/b.png", "cat/deep/d.png", "dog/a.png"]
    assert found("**")[0] == ["cat/b.png", "cat/c.jpg", "cat/deep/d.png", "cow/f.PNG", "dog/a.png"]
    names, source = found("[cd]o*")  # folders
    assert names == ["cow/f.PNG", "dog/a.png"] and source.dataset.features["label"].names == ["cow", "dog"]
    monkeypatch.chdir(tmp_path)
    assert len(load_source("*/*.png")) == 2 and len(load_source("**/*.jpg")) == 1
    make.write(tmp_path / "[x]" / "a.png", make.png(1))
    assert len(load_source(str(tmp_path / "[x]"))) == 1  # a folder of that name
    with pytest.raises(SourceError, match=r"matches no file; give .parquet files or .tar files, or images"):
        load_source(str(tmp_path / "*.gif"))


OUTSIDE = "outside of its data set"


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_name_files_of_their_own_data_set(make, tmp_path, streaming, monkeypatch):
    """Relative to the shards or whole paths below them; nothing else, and no address, before it is allowed."""
    monkeypatch.setattr("hf_ssl.data.remote.read", lambda address: make.png(9))
    inside = make.write(tmp_path / "set" / "images" / "a.png", make.png(1))
    outside = make.write(tmp_path / "b.png", make.png(2))
    (inside.parent / "link.png").symlink_to(outside)
    paths = ["images/a.png", str(inside), "images/link.png", str(outside), "../b.png", "images/../../b.png"]
    paths += ["https://localhost:1/a.png", "hf://datasets/a/b/c.png", f"zip://a.png::{outside}", "s3://bucket/a.png"]
    pq.write_table(pa.table({"image": [{"bytes": None, "path": p} for p in paths]}), tmp_path / "set" / "a.parquet")

    def outcome(source, row):
        try:
            return int(source.decode(row)[0, 0, 0])
        except BadImageError as error:
            return OUTSIDE if OUTSIDE in str(error) else str(error)

    source = load_source(str(tmp_path / "set" / "*.parquet"), streaming=streaming)
    rows = [row for _, row in zip(paths, RowStream(source, len(paths), shuffle=False))]
    assert [outcome(source, row) for row in rows] == [1, 1, 2] + [OUTSIDE] * 7
    source = load_source(str(tmp_path / "set" / "*.parquet"), streaming=streaming, allow_outside_files=True)
    assert [outcome(source, row) for row in rows] == [1, 1, 2, 2, 2, 2, 9, 9, 9, 9]


def test_rows_of_the_hub_name_files_of_their_repo(make):
    home = Home(("/cache/hub",), "owner/name")
    for path in (
        "hf://datasets/owner/name@main/a.png",
        "hf://datasets/owner/name/a.png",
        "zip://a.png::hf://datasets/owner/name@main/a.zip",
        "/cache/hub/blobs/a",
    ):
        assert resolved(path, home) == path
    for path in ("hf://datasets/owner/names/a.png", "hf://owner/name/a.png", "/etc/a.png", "/cache/hub/../a.png"):
        with pytest.raises(OutsideError, match=OUTSIDE):
            resolved(path, home)
    assert resolved("/anywhere/a.png", None) == "/anywhere/a.png"  # a dataset that the program made
    assert resolved("hf://datasets/any/repo/a.png", None)
    with pytest.raises(OutsideError, match=OUTSIDE):
        resolved("http://localhost/a.png", None)


def test_channels_can_be_asked_for(make, tmp_path):
    make.write(tmp_path / "set" / "a.png", make.png(100))
    source = load_source(str(tmp_path / "set"), channels=1)
    assert source.decode(source.dataset[0]).shape == (4, 4, 1)


def test_what_is_no_dataset_says_so(make, tmp_path, monkeypatch):
    for spec, message in {
        "emojis": r"'emojis' is not a dataset that is known here. Did you mean emoji\? Give one of emoji",
        "fashion_mnist": "Did you mean fashion-mnist?",
        "/no/such/folder": "is not a dataset that is known here. Give",
        "/no/such/*.parquet": "matches no file; give .parquet files or .tar files",
        "a/b/c": "is not a dataset that is known here",
    }.items():
        with pytest.raises(SourceError, match=message):
            load_source(spec)
    with pytest.raises(SourceError, match="emoji has no split 'validation'; it has train, test"):
        load_source("emoji", "validation")
    make.write(tmp_path / "docs" / "a.txt", b"x")
    with pytest.raises(SourceError, match=r"holds no image .* it holds files with .txt"):
        load_source(str(tmp_path / "docs"))
    with pytest.raises(SourceError, match="is a file of a kind that is not read here"):
        load_source(str(tmp_path / "docs" / "a.txt"))


def test_hub_offline_is_a_sentence():
    script = (
        "from hf_ssl.data import load_source, SourceError\n"
        "try: load_source('someone/something:config', streaming=True)\n"
        "except SourceError as error: print(error)\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=offline)
    assert done.stdout.startswith(
        "someone/something:config is no file or folder here, and as a Hub dataset it cannot be"
    ), done.stdout + done.stderr


def test_importing_the_package_loads_nothing_heavy():
    script = (
        "import sys, hf_ssl.data; print([m for m in ('torch', 'datasets', 'cv2', 'PIL', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
