"""Labelled subsets: balanced, the same wherever and however they are drawn, kept with the run, refused in words."""

import itertools
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest

from hf_ssl.data import ImageSource, LabeledRows, SourceError, draw_labeled, label_names, load_source
from hf_ssl.data import labels as labels_module
from hf_ssl.data.stream import RowStream
from tests import PATIENCE

ROWS, KINDS = 60, ("map", "parquet", "one row group", "tar")


@pytest.fixture(scope="module")
def root(make, tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled")
    for i, (low, high) in enumerate(itertools.pairwise([0, 20, 23, 41, ROWS])):
        make.write_parquet(root / "many" / f"{i}.parquet", range(low, high), cls=[v % 3 for v in range(low, high)])
        make.write_tar(root / f"{i}.tar", range(low, high))
    table = datasets.Dataset.from_parquet(str(root / "many" / "*.parquet"), cache_dir=str(root / "cache"))
    table.to_parquet(str(root / "one.parquet"), batch_size=1000)
    return root


@pytest.fixture(scope="module")
def source_of(root):
    specs = {"map": "many", "parquet": "many", "one row group": "one.parquet", "tar": "*.tar"}
    return {kind: load_source(str(root / spec), streaming=kind != "map") for kind, spec in specs.items()}


def table(values, **columns):
    """A map-style source without pictures, of one label column."""
    rows = datasets.Dataset.from_dict({"image": [b""] * len(values), "label": values, **columns})
    return ImageSource("table", rows, labels=("label",))


def pictured(source):
    return [int(source.decode(source.dataset[i])[0, 0, 0]) for i in range(len(source.dataset))]


@pytest.mark.parametrize("rule", [{"per_class": 4}, {"fraction": 0.2}, {"ids": [59, 3, 22, 40]}, {}])
def test_one_subset_whatever_the_kind_of_source_and_its_shards(source_of, rule):
    drawn = {kind: draw_labeled(source_of[kind], seed=5, **rule) for kind in KINDS}
    record = drawn["map"][1]
    assert record.labels == tuple(row % 3 for row in record.rows) and list(record.rows) == sorted(set(record.rows))
    assert record.names == ("0", "1", "2") and record.column == "cls" and record.seed == 5
    for source, other in drawn.values():
        assert (other.rows, other.labels, other.names, other.rule) == (
            record.rows, record.labels, record.names, record.rule,
        )  # fmt: skip
        record.check_same(other)
        assert not source.is_stream and pictured(source) == list(record.rows)
        assert source.dataset["_label"][:] == list(record.labels) and source.labels == ("cls",)
        assert source.dataset.features["_label"].names == ["0", "1", "2"]


def test_trap_1_other_processes_draw_the_same_rows(root, source_of):
    """Another rank, global seed and hash seed: kekmodel#5 drew another subset on each rank."""
    script = (
        "import sys, json, random, numpy as np, torch; from hf_ssl.data import draw_labeled, load_source\n"
        "random.seed(9), np.random.seed(9), torch.manual_seed(9)\n"
        f"source = load_source({str(root / 'many')!r}, streaming=True)\n"
        "print(json.dumps(draw_labeled(source, per_class=5, seed=1)[1].to_dict()))\n"
        "print(json.dumps(draw_labeled(load_source('emoji'), 'subgroup', fraction=.1, seed=1)[1].to_dict()))\n"
    )
    env = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=PATIENCE)
    there = [LabeledRows.from_dict(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(there) == 2, done.stderr
    np.random.seed(1)
    draw_labeled(source_of["map"], per_class=5, seed=1)[1].check_same(there[0])
    draw_labeled(load_source("emoji"), "subgroup", fraction=0.1, seed=1)[1].check_same(there[1])


def test_the_seed_chooses_and_smaller_subsets_lie_in_larger_ones(source_of):
    few, more = (set(draw_labeled(source_of["map"], per_class=k, seed=1)[1].rows) for k in (4, 9))
    assert few < more and len(few) == 12
    assert set(draw_labeled(source_of["map"], per_class=4, seed=2)[1].rows) != few
    # no class is drawn in step with another one
    offsets = [[row // 3 for row in sorted(few) if row % 3 == c] for c in range(3)]
    assert offsets[0] != offsets[1] != offsets[2]


def test_per_class_is_exact_and_every_row_as_likely():
    counts = np.zeros(40)
    for seed in range(400):
        record = draw_labeled(table([0] * 10 + [1] * 30), per_class=5, seed=seed)[1]
        assert np.bincount(record.labels).tolist() == [5, 5]
        counts[list(record.rows)] += 1
    # binomial: standard deviation 10 of the first ten's mean 200, 7.5 of the others' 66.7
    assert abs(counts[:10] - 200).max() < 45 and abs(counts[10:] - 400 / 6).max() < 35


@pytest.mark.parametrize(
    "have, fraction, take",
    [
        ([50, 30, 20], 0.1, [5, 3, 2]),
        ([7, 7, 7], 0.5, [4, 4, 3]),  # 10.5 rounds up to 11; 3.5 each: the earlier classes first
        ([97, 2, 1], 0.05, [3, 1, 1]),  # 4.85, 0.1, 0.05: at least one, at the cost of the largest
        ([10, 10], 0.25, [3, 2]),  # 5 of 20, not 2.5 + 2.5 rounded to even: 4
        ([6, 0, 3], 1.0, [6, 0, 3]),
        ([999, 1], 0.999, [998, 1]),
    ],
)
def test_fraction_by_its_rounding_rule(have, fraction, take):
    rows = table([label for label, count in enumerate(have) for _ in range(count)])
    rows.dataset = rows.dataset.cast_column("label", datasets.ClassLabel(num_classes=len(have)))
    record = draw_labeled(rows, fraction=fraction, seed=0)[1]
    assert np.bincount(record.labels, minlength=len(have)).tolist() == take


@pytest.mark.parametrize(
    "values, names, wanted",
    [
        (["cat", None, "ant", "cat"], ["ant", "cat"], [1, -1, 0, 1]),
        ([10, 2, -1, None, 2], ["2", "10"], [1, 0, -1, -1, 0]),
        ([1.0, float("nan"), 0.0], ["0", "1"], [1, -1, 0]),
        ([True, False], ["False", "True"], [1, 0]),
    ],
)
def test_labels_of_any_kind_become_class_numbers(values, names, wanted):
    source = table(values)
    record = draw_labeled(source)[1]
    assert label_names(source) == names == list(record.names)
    assert dict(zip(record.rows, record.labels)) == {i: c for i, c in enumerate(wanted) if c >= 0}
    assert record.rule == "every row that has a label"


def test_declared_names_are_kept_and_nothing_is_read_for_them():
    source = table([1, 0, -1, 1])
    source.dataset = source.dataset.cast_column("label", datasets.ClassLabel(names=["b", "a", "unused"]))
    assert label_names(source) == ["b", "a", "unused"]
    labeled, record = draw_labeled(source)
    assert (record.rows, record.labels, record.names) == ((0, 1, 3), (1, 0, 1), ("b", "a", "unused"))
    assert labeled.dataset.features["_label"].names == ["b", "a", "unused"]


def test_the_column_is_the_first_unless_named():
    source = load_source("emoji")
    assert label_names(source)[:2] == ["activities", "animals-nature"] and len(label_names(source, "subgroup")) > 90
    assert load_source("emoji", label_column="subgroup").labels == ("subgroup",)
    labeled, record = draw_labeled(source, "style", per_class=3)
    assert record.names == ("google", "twitter") and labeled.labels == ("style",)
    styles = labeled.dataset["style"][:]
    assert [record.names[i] for i in labeled.dataset["_label"]] == styles


def test_a_subset_copies_no_picture_and_names_rows_by_their_number(source_of):
    labeled = draw_labeled(source_of["map"], ids=[41, 7])[0]
    assert labeled.dataset._indices is not None  # a selection of the table on disk
    for kind, place in (("map", "row 41 of"), ("parquet", "row 0 of"), ("tar", "row 0 in shard 3 of")):
        chosen = draw_labeled(source_of[kind], ids=[41, 7])[0]
        row = chosen.dataset[1]
        stream = RowStream(source_of[kind], 60, shuffle=False)
        same = next(row for row in stream if row["image"]["path"].endswith("41.png"))
        assert row["_row"] == same["_index"] and place in chosen.where(row) == source_of[kind].where(same)


def test_drawing_from_a_selection_copies_no_picture_either(source_of):
    base = source_of["map"]
    reversed_half = ImageSource(base.name, base.dataset.select(range(59, 0, -2)), labels=base.labels)
    labeled, record = draw_labeled(reversed_half, per_class=3)
    assert labeled.dataset.data.num_rows == 60 and labeled.dataset._indices is not None
    assert pictured(labeled) == [59 - 2 * row for row in record.rows]
    assert labeled.dataset["_label"][:] == [red % 3 for red in pictured(labeled)] == list(record.labels)
    assert labeled.dataset["_row"][:] == list(record.rows)
    again, part = draw_labeled(labeled, per_class=1)
    assert len(again) == 3 and again.dataset["_row"][:] == [record.rows[row] for row in part.rows]
    assert pictured(again) == [59 - 2 * row for row in again.dataset["_row"]]


def test_of_a_stream_only_the_labels_and_the_chosen_pictures_are_read(source_of, monkeypatch):
    shards, read = source_of["parquet"].shards, []
    tables = type(shards).tables
    monkeypatch.setattr(
        type(shards), "tables", lambda self, i, columns=None: read.append((i, columns)) or tables(self, i, columns)
    )
    draw_labeled(source_of["parquet"], ids=[0, 59])
    pictures = [shard for shard, columns in read if columns != ["cls"]]
    assert pictures == [0, shards.count - 1] and len(read) == shards.count + 2


def test_a_stream_keeps_no_more_rows_in_memory_than_allowed(source_of, monkeypatch):
    monkeypatch.setattr(labels_module, "MAX_HELD_ROWS", 11)
    with pytest.raises(
        SourceError, match=r"12 labelled rows of the stream .* held in memory, more than 11\. Choose fewer"
    ):
        draw_labeled(source_of["tar"], per_class=4)
    assert len(draw_labeled(source_of["map"], per_class=4)[0]) == 12


def test_streams_that_declare_no_columns(make):
    def rows():
        yield from ({"image": {"bytes": make.png(i), "path": None}, "label": "ab"[i % 2]} for i in range(6))

    source = ImageSource("made", datasets.IterableDataset.from_generator(rows), labels=("label",))
    assert source.dataset.features is None
    labeled, record = draw_labeled(source, per_class=2)
    assert record.names == ("a", "b") and pictured(labeled) == list(record.rows)


@pytest.mark.parametrize("form", ["lines", "list", "record"])
def test_ids_from_a_file(source_of, tmp_path, form):
    wanted = draw_labeled(source_of["map"], ids=[8, 3, 5])[1]
    text = {"lines": "8\n\n 3 \n5\n", "list": "[8, 3, 5]", "record": json.dumps(wanted.to_dict())}[form]
    (tmp_path / "rows").write_text(text)
    record = draw_labeled(source_of["parquet"], ids=tmp_path / "rows")[1]
    assert record.rows == (3, 5, 8) and record.rule == f"ids of {tmp_path / 'rows'}"
    record.check_same(wanted)


def edited(record, **changes):
    return json.dumps({**record.to_dict(), **changes})


def test_bad_ids_are_named_by_file_line_and_value(source_of, tmp_path):
    record = draw_labeled(source_of["map"], ids=[3, 8])[1]
    file = tmp_path / "rows.txt"
    for text, message in (
        ("1\nseven\n", "rows.txt, line 2: 'seven' is no row number; rows count from 0"),
        ("1\n-2\n", "line 2: '-2' is no row number"),
        ("1\n\n60\n", r"line 3: there is no row 60; .* has 60 rows, 0 to 59"),
        ("1\n2\n1\n", "line 3: row 1 was named before, at .*line 1"),
        ("", "no row number is given"),
        ("[1, 2.5]", "item 1: '2.5' is no row number"),
        ("[1, true]", "item 1: 'True' is no row number"),
        ("[1,\n2", "line 2: it is not JSON"),
        ('{"rows": [1]}', "no labeled_rows.json of a run: .* lacks dataset, split"),
        (edited(record, labels=[0, 7]), "no labeled_rows.json of a run"),
        (edited(record, names=["x", "y", "z"]), r"row 3 was of class 'x' when .* of class '0' .* another dataset"),
    ):
        file.write_text(text)
        with pytest.raises(SourceError, match=message):
            draw_labeled(source_of["map"], ids=file)
    with pytest.raises(SourceError, match=r"nope.txt cannot be read: .*No such file"):
        draw_labeled(source_of["map"], ids=str(tmp_path / "nope.txt"))
    with pytest.raises(SourceError, match=r"ids, item 1: row 1 of table .* has no label"):
        draw_labeled(table([0, -1]), ids=[0, 1])


def test_a_declared_class_without_rows_gets_advice_that_helps():
    features = datasets.Features(image=datasets.Value("int64"), label=datasets.ClassLabel(names=["a", "b", "c"]))
    rows = datasets.Dataset.from_dict({"image": [0] * 6, "label": [0, 0, 0, 2, 2, 2]}, features=features)
    source = ImageSource("declared", rows, labels=("label",))
    with pytest.raises(
        SourceError, match=r"0 labelled row.* of class .b., .*declared but has no rows, so ask for a fraction"
    ):
        draw_labeled(source, per_class=1)
    _, record = draw_labeled(source, fraction=0.5)  # the advice
    assert record.names == ("a", "b", "c") and set(record.labels) == {0, 2}


def test_what_cannot_be_drawn_says_why(source_of):
    two = table(["a"] * 9 + ["b"] * 2 + ["c"])
    for options, message in (
        ({"per_class": 3}, r"2 labelled row\(s\) of class 'b', fewer than the 3 per class .*also too few: 'c' \(1\)"),
        ({"per_class": 0}, "per_class is 0; it is at least 1"),
        (
            {"fraction": 0.1},
            "fraction 0.1 of the 12 labelled rows .* is 1 row.*one for each of 3 classes. .*least 0.25",
        ),
        ({"fraction": 1.1}, "fraction is 1.1; it lies above 0 and is at most 1"),
        ({"fraction": 0.5, "per_class": 1}, "per_class and fraction are both given"),
        ({"column": "colour"}, "table has no column 'colour' for labels; its columns are image, label"),
    ):
        with pytest.raises(SourceError, match=message):
            draw_labeled(two, **options)
    for values, message in (
        ([-1, None], "has no row with a label in column 'label'"),
        ([0.5, 1.0], r"row 0 holds '0.5' \(float\); a class is one text or whole number"),
        ([[1], [2]], r"row 0 holds '\[1\]' \(list\)"),
    ):
        with pytest.raises(SourceError, match=message):
            draw_labeled(table(values))
    unnamed = ImageSource("table", table([1]).dataset)
    for call in (draw_labeled, label_names):
        with pytest.raises(SourceError, match=r"has no label column; its columns are image, label. .*--label_column"):
            call(unnamed)
    beyond = table([0, 5])
    beyond.dataset = beyond.dataset.cast(
        datasets.Features({**beyond.dataset.features, "label": datasets.Value("int8")})
    )
    beyond.dataset.info.features["label"] = datasets.ClassLabel(names=["a", "b"])
    with pytest.raises(SourceError, match="row 1 has class 5, but there are 2 names"):
        draw_labeled(beyond)


def test_a_run_refuses_another_subset():
    first = draw_labeled(table(["a", "b"] * 20), per_class=3, seed=0)[1]
    again = LabeledRows.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again == first
    first.check_same(again)
    other = draw_labeled(table(["a", "b"] * 20), per_class=3, seed=1)[1]
    with pytest.raises(
        ValueError, match=r"labelled rows differ: 6 rows here \(3 per class, seed 0\) and 6 there"
    ) as error:
        first.check_same(other)
    at = next(i for i in range(6) if first.rows[i] != other.rows[i])
    assert f"the first that differs is number {at}: row {first.rows[at]} (" in str(error.value)
    more = LabeledRows(**{**first.__dict__, "rows": (*first.rows, 99), "labels": (*first.labels, 1)})
    with pytest.raises(ValueError, match=r"6 rows here .* 7 there .* number 6: none here, row 99 \(b\) there"):
        first.check_same(more)
    with pytest.raises(ValueError, match="classes differ: a, b here and a, c there"):
        first.check_same(LabeledRows(**{**first.__dict__, "names": ("a", "c")}))
    with pytest.raises(ValueError, match="record of the labelled rows lacks rows"):
        LabeledRows.from_dict({key: value for key, value in first.to_dict().items() if key != "rows"})
