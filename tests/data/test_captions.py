"""Texts beside pictures: found wherever they are kept, never taken for labels, drawn reproducibly, and needed."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch

from hf_ssl.data import BadImageError, ImageSource, SourceError, build_dataloader, load_source


class Views:
    def count_views(self, keys=None):
        return 1

    def draw(self, images, rng, *_):
        return {"pixel_values": images[0][:1, :1].astype(np.float32) + np.float32(rng.random())}


def encode(texts):
    """The length and the first letter of each text."""
    return {"input_ids": torch.tensor([[len(text), ord(text[0])] for text in texts])}


def parquet(make, path, columns, count=3):
    rows = {"image": [{"bytes": make.png(i), "path": None} for i in range(count)], **columns}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(path))
    return str(path)


def all_captions(source):
    rows = source.dataset if source.is_stream else (source.dataset[i] for i in range(len(source)))
    return [source.captions(row) for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["text", "captions", "sentence", "alt", "description"])
def test_columns_of_texts_are_found_and_are_no_labels(make, tmp_path, column, streaming):
    many = column == "captions"
    texts = [["a cat", " the cat "], ["dog"], ["bird", ""]] if many else ["a cat", "dog ", "bird"]
    spec = parquet(make, tmp_path / "a.parquet", {"label": [0, 1, 0], column: texts, "notes": ["x", "y", "z"]})
    source = load_source(spec, streaming=streaming)
    assert source.has_captions and source.caption_column == column and source.labels == ("label",)
    assert source.caption_columns == (column,)
    wanted = [["a cat", "the cat"], ["dog"], ["bird"]] if many else [["a cat"], ["dog"], ["bird"]]
    assert all_captions(source) == wanted
    named = load_source(spec, streaming=streaming, caption_column="notes")
    assert all_captions(named) == [["x"], ["y"], ["z"]] and named.labels == ("label",)


def test_what_is_no_text_is_no_caption(make, tmp_path):
    spec = parquet(make, tmp_path / "a.parquet", {"text": [0, 1, 2], "label": ["a", "b", "a"]})
    source = load_source(spec)
    assert not source.has_captions and source.caption_column is None and source.labels == ("label",)
    with pytest.raises(SourceError, match=r"has no captions; its columns are image, text, label. .*--caption_column"):
        source.captions(source.dataset[0])
    for name, message in (("txt", "has no column 'txt'; its columns are"), ("text", "has no text in column 'text'")):
        with pytest.raises(SourceError, match=message):
            load_source(spec, caption_column=name)
    # a column asked for as captions serves as that, and one asked for as labels is no caption
    assert load_source(spec, caption_column="label").labels == ()
    both = parquet(make, tmp_path / "b.parquet", {"caption": ["a", "b", "c"]})
    assert not load_source(both, label_column="caption").has_captions
    classes = datasets.Dataset.from_parquet(both, cache_dir=str(tmp_path / "cache")).class_encode_column("caption")
    classes.to_parquet(str(tmp_path / "c.parquet"))
    source = load_source(str(tmp_path / "c.parquet"))
    assert source.labels == ("caption",) and not source.has_captions


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "json"])
def test_webdataset(make, tmp_path, kind, streaming):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(4):
            text = f"text {i}" if kind == "txt" else json.dumps({"caption": f"text {i}", "width": 4})
            for name, data in ((f"{i}.png", make.png(i)), (f"{i}.{kind}", text.encode()), (f"{i}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = load_source(str(tmp_path / "a.tar"), streaming=streaming)
    assert source.caption_column == {"txt": "txt", "json": "json.caption"}[kind] and source.labels == ("cls",)
    assert all_captions(source) == [[f"text {i}"] for i in range(4)]
    batch = next(iter(build_dataloader(source, Views(), 4, shuffle=False, encode_text=encode)))
    assert batch["input_ids"].tolist() == [[6, ord("t")]] * 4
    if kind == "json":
        assert load_source(str(tmp_path / "a.tar"), caption_column="json.caption").caption_columns == ("json",)
        with pytest.raises(SourceError, match=r"has no column 'json\.nope'"):
            load_source(str(tmp_path / "a.tar"), caption_column="json.nope")


def test_text_files_beside_the_images_of_a_folder(make, tmp_path):
    for i, name in enumerate(("a.jpg", "b.png", "c.png")):
        make.write(tmp_path / "set" / name, make.png(i))
    assert not load_source(str(tmp_path / "set")).has_captions
    make.write(tmp_path / "set" / "a.txt", b"a cat\n\n the cat \n")
    make.write(tmp_path / "set" / "b.txt", "ein Hündchen".encode())
    source = load_source(str(tmp_path / "set"))
    assert [source.captions(source.dataset[i]) for i in range(2)] == [["a cat", "the cat"], ["ein Hündchen"]]
    with pytest.raises(BadImageError, match=r"c.png: the row has no caption"):
        source.captions(source.dataset[2])
    assert source.labels == ()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_files_of_a_folder(make, tmp_path, kind):
    root = tmp_path / "set"
    for i, name in enumerate(("train/a.png", "train/deep/b.png", "train/c.png", "test/d.png")):
        make.write(root / name, make.png(i))
    rows = [
        {"file_name": "a.png", "text": "a, b", "label": 2},
        {"file_name": "deep/b.png", "text": "c", "label": None},
        {"file_name": "elsewhere.png", "text": "no", "label": 1},
    ]
    if kind == "csv":
        text = 'file_name,text,label\na.png,"a, b",2\ndeep/b.png,c,\nelsewhere.png,no,1\n'
    else:
        text = "\n".join(json.dumps(row) for row in rows)
    make.write(root / "train" / f"metadata.{kind}", text.encode())
    source = load_source(str(root))
    assert source.dataset["text"][:] == ["a, b", None, "c"] and source.dataset["label"][:] == [2, None, None]
    assert source.caption_column == "text" and source.labels == ("label",)
    assert source.captions(source.dataset[0]) == ["a, b"]
    make.write(root / "train" / f"metadata.{kind}", b"name,text\na.png,x\n" if kind == "csv" else b'{"name": 1}\n')
    with pytest.raises(SourceError, match=rf"metadata.{kind}, line \d: there is no file_name"):
        load_source(str(root))
    make.write(root / "train" / f"metadata.{kind}", b"\xff\xfe")
    with pytest.raises(SourceError, match=rf"metadata.{kind} cannot be read as a table"):
        load_source(str(root))


def test_a_row_without_a_caption_is_replaced_like_a_broken_image(make, tmp_path):
    spec = parquet(make, tmp_path / "a.parquet", {"text": ["one", None, "three", " "]}, 4)
    loader = build_dataloader(
        load_source(spec), Views(), 4, shuffle=False, encode_text=encode, keep_columns=("_index",)
    )
    batch = next(iter(loader))
    assert batch["_index"].tolist() == [0, 2, 2, 0] and batch["pixel_values"][:, 0, 0, 0].long().tolist() == [
        0,
        2,
        2,
        0,
    ]
    assert batch["input_ids"][:, 0].tolist() == [3, 5, 5, 3]
    assert loader.ledger.names[0].endswith("a.parquet: the row has no caption (text is empty)")
    assert loader.ledger.distinct == 2
    # who wants no text leaves none out
    assert next(iter(build_dataloader(load_source(spec), Views(), 4, shuffle=False)))["pixel_values"].shape[0] == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_the_drawn_text_depends_on_seed_epoch_and_row_alone(make, tmp_path, streaming):
    texts = [[f"{row} " + "x" * n for n in range(20)] for row in range(8)]
    for i in range(2):
        parquet(make, tmp_path / f"{i}.parquet", {"captions": texts[4 * i : 4 * i + 4]}, 4)
    source = load_source(str(tmp_path / "*.parquet"), streaming=streaming)

    class More(Views):
        def count_views(self, keys=None):
            return 3

        def draw(self, images, rng, *_):
            rng.random(99)  # other numbers for the views
            return super().draw(images, rng)

    def drawn(views=Views, seed=0, **options):
        loader = build_dataloader(
            source, views(), 4, seed=seed, encode_text=encode, keep_columns=("_index", "_epoch"), **options
        )
        found = {}
        for batch, _ in zip(loader, range(2)):
            found |= {(0, i): n for i, n in zip(batch["_index"].tolist(), batch["input_ids"][:, 0].tolist())}
        for batch, _ in zip(loader, range(2)):
            found |= {(1, i): n for i, n in zip(batch["_index"].tolist(), batch["input_ids"][:, 0].tolist())}
        loader.close()
        return found

    alone = drawn()
    assert len(alone) == 16 and drawn() == drawn(More) == drawn(num_workers=2) == drawn(shuffle=False) == alone
    other = drawn(seed=1)
    assert other.keys() == alone.keys() and sum(other[key] != alone[key] for key in alone) > 8
    assert sum(alone[0, i] != alone[1, i] for i in range(8)) > 4


def test_captions_that_are_wanted_must_be_there(make, tmp_path):
    spec = parquet(make, tmp_path / "a.parquet", {"label": [0, 1, 2]})
    with pytest.raises(SourceError, match="has no captions"):
        build_dataloader(load_source(spec), Views(), 2, encode_text=encode)


def test_a_source_made_by_hand():
    rows = datasets.Dataset.from_dict({"image": [b"", b""], "words": [["a", "b"], ["c"]]})
    source = ImageSource("hand", rows, caption_column="words")
    assert source.has_captions and source.captions(rows[0]) == ["a", "b"]
    drawn = {source.caption(rows[0], np.random.default_rng(seed)) for seed in range(20)}
    assert drawn == {"a", "b"}


def test_emoji_draw_the_name_and_some_keywords():
    source = load_source("emoji:placed", "test")
    row = source.dataset[0]
    assert source.captions(row) == [row["name"]] and source.labels == ("group", "subgroup")
    assert set(source.caption_columns) == {"name", "keywords"}
    drawn = [source.caption(row, np.random.default_rng(seed)) for seed in range(300)]
    parts = [text.split(", ") for text in drawn]
    named, alone = ([part for part in parts if (part[0] == row["name"]) is first] for first in (True, False))
    assert 100 < len(named) < 200  # half of them
    keywords = [part[1:] for part in named] + alone
    assert all(len(set(some)) == len(some) and set(some) <= set(row["keywords"]) for some in keywords)
    assert {len(part) - 1 for part in named} == set(range(len(row["keywords"]) + 1))  # the name alone as well
    assert {len(part) for part in alone} == set(range(1, len(row["keywords"]) + 1))
    assert len({tuple(part) for part in named if len(part) == 3}) > 5
    assert source.caption(row, np.random.default_rng(7)) == drawn[7]
    assert load_source("emoji", caption_column="subgroup").captions(row) == [row["subgroup"]]
    batch = next(iter(build_dataloader(source, Views(), 4, encode_text=encode)))
    assert batch["input_ids"].shape == (4, 2)
