"""One division of the rows: what trains, what validates and what tests are apart, however they are named."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_ssl.data import draw_labeled, load_source
from hf_ssl.data.same import copies, shared
from hf_ssl.data.shards import SourceError
from hf_ssl.data.splits import divide, draw, free, trained_on, whole_of, without


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """60 pictures of noise in two class folders, and the same as parquet."""
    root, rng = tmp_path_factory.mktemp("splits"), np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / "folder" / name).mkdir(parents=True)
        for i in range(30):
            Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).save(root / "folder" / name / f"{i}.png")
    files = sorted((root / "folder").glob("*/*.png"))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("string"))
    rows = {"image": images, "label": [path.parent.name for path in files]}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(root / "rows.parquet"))
    return root


def pictures(source) -> set[bytes]:
    """The bytes of every picture, as they are stored."""
    images = [row["image"] for row in source.dataset]
    return {i["bytes"] if i["bytes"] is not None else open(i["path"], "rb").read() for i in images}


def assert_apart(division) -> None:
    sets = [pictures(division.train), *(pictures(held) for held in division.held)]
    assert all(sets) and sum(map(len, sets)) == len(set.union(*sets))
    for bank, queries in division.tests:
        assert not pictures(bank) & pictures(queries)


@pytest.mark.parametrize("name", ["folder", "rows.parquet"])
@pytest.mark.parametrize("fraction", [None, 0.25])
def test_a_set_of_one_split_is_divided_and_rows_keep_their_numbers(root, name, fraction):
    spec = str(root / name)
    division = divide(spec, tests=(spec,), validation_fraction=fraction)
    assert_apart(division)
    record = division.record()
    assert (record["train"], record["validation"], record["test"], record["of"]) == (
        (48, 0, 12, 60) if fraction is None else (36, 12, 12, 60)
    )
    assert f"{spec} has no split to test on: 12 of its 60 pictures, a fixed draw, are kept for it." in division.said
    whole = load_source(spec)
    kept = np.sort(np.random.default_rng(0).permutation(60)[:12])  # the draw that earlier versions made as well
    assert division.tests[0][1].part.numbers.tolist() == kept.tolist()
    for part in (division.train, *division.held):
        for position in (0, len(part) - 1):
            assert part.dataset[position]["image"] == whole.dataset[part.number(position)]["image"]
    row = {**division.train.dataset[3], "_index": 3}
    assert division.train.where(row) == whole.where(
        {**whole.dataset[part_number(division, 3)], "_index": part_number(division, 3)}
    )
    again = divide(**json.loads(json.dumps(record["request"])))
    assert again.train.part.numbers.tolist() == division.train.part.numbers.tolist()
    assert len(division.tests[0][0]) == 48  # the bank: every row that is not scored


def part_number(division, position):
    return division.train.number(position)


@pytest.mark.parametrize("name", ["folder", "rows.parquet"])
def test_labels_are_drawn_from_what_trains_and_named_by_their_rows_in_the_whole(root, name):
    division = divide(str(root / name), tests=(str(root / name),), validation_fraction=0.25)
    whole, train = load_source(str(root / name)), division.train
    labeled, rows = draw_labeled(train, fraction=1.0)
    assert len(rows.rows) == 36 and set(rows.rows) == set(train.part.numbers.tolist())
    assert pictures(labeled) == pictures(train)
    few, record = draw_labeled(train, per_class=2, seed=3)
    names = load_label_names(whole)
    assert few.part.numbers.tolist() == list(record.rows)
    for place, number in enumerate(record.rows):
        assert few.dataset[place]["image"] == whole.dataset[number]["image"] and few.dataset[place]["_row"] == number
        assert record.names[record.labels[place]] == names[number]
    chosen, same = draw_labeled(train, ids=list(record.rows))
    assert same.rows == record.rows and same.labels == record.labels and pictures(chosen) == pictures(few)
    for held in division.held:
        with pytest.raises(SourceError, match=f"row {held.number(0)} .* is kept to validate or test on"):
            draw_labeled(train, ids=[int(held.number(0))])
    with pytest.raises(SourceError, match=r"there is no row 60; .* has 60 rows, 0 to 59"):
        draw_labeled(train, ids=[60])
    with pytest.raises(SourceError, match="fewer than the 30 per class") as error:
        draw_labeled(train, per_class=30)
    assert "without the rows kept to validate or test on" in str(error.value)


def load_label_names(source):
    kind = source.dataset.features["label"]
    values = source.dataset["label"]
    return [kind.names[value] for value in values] if hasattr(kind, "names") else list(values)


def test_every_way_to_name_the_same_pictures_keeps_them_apart(root, tmp_path):
    spec = str(root / "folder")
    (tmp_path / "link").symlink_to(spec)
    for other in (f"{spec}/", str(tmp_path / "link"), f"{root}/../{root.name}/folder", str(root / "rows.parquet")):
        division = divide(spec, tests=(other,))  # --eval_dataset
        assert_apart(division)
        assert len(division.train) == 48
        unlabeled = free(division.held, whole_of(load_source(other), "train"))  # --unlabeled_dataset
        assert pictures(unlabeled) == pictures(division.train)
    assert_apart(divide(spec, tests=(spec,), eval_split="train", explicit=True))
    with pytest.raises(SourceError, match="split training, is trained on, so nothing can be validated on it"):
        divide(spec, tests=(spec,), validation_split="training")
    with pytest.raises(SourceError, match="has no split 'dev'"):
        divide(spec, tests=(spec,), eval_split="dev", explicit=True)
    everything = divide("emoji", "all", tests=("emoji:placed", "emoji"))  # "all" holds the test drawings
    assert_apart_emoji(everything)


def assert_apart_emoji(division):
    test = set(load_source("emoji", "test").dataset["name"])
    for source in (division.train, *(bank for bank, _ in division.tests)):
        assert not set(source.dataset["name"]) & test and len(source) == 3028
    assert "are also in emoji" in division.record()["rule"]
    own = divide("emoji", tests=("emoji:placed", "emoji"))  # declared splits are taken as they are
    assert len(own.train) == 3028 and own.train.part.numbers is None and own.said == ()


def test_copies_of_a_picture_are_on_one_side(root, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(10):
            content = (root / "folder" / name / f"{i}.png").read_bytes()
            for copy in range(1 + 2 * (i < 5)):
                (tmp_path / name / f"{i}-{copy}.png").write_bytes(content)
    source = load_source(str(tmp_path))
    assert len(source) == 40 and len(np.unique(copies(source))) == 20
    division = divide(str(tmp_path), tests=(str(tmp_path),))
    assert 1 <= len(division.tests[0][1]) <= 8
    assert_apart_by_content = pictures(division.train) & pictures(division.tests[0][1])
    assert not assert_apart_by_content
    alike = tmp_path / "alike"
    alike.mkdir()
    for i in range(12):
        (alike / f"{i}.png").write_bytes((root / "folder" / "ant" / "0.png").read_bytes())
    assert draw(load_source(str(alike)), 0.2) is None


def test_what_cannot_be_divided_says_so(root, tmp_path):
    stream = divide(str(root / "rows.parquet"), tests=(str(root / "rows.parquet"),), streaming=True)
    assert stream.tests == () and stream.online == (None, None)
    assert "a stream cannot be divided" in stream.said[0] and stream.record()["train"] == 60
    asked = divide(str(root / "rows.parquet"), "train", (str(root / "rows.parquet"),), "train", True, streaming=True)
    assert asked.tests == ()  # never the rows that are trained on
    with pytest.raises(SourceError, match="drop --streaming"):
        divide(str(root / "rows.parquet"), validation_fraction=0.2, streaming=True)
    for i in range(9):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.png").write_bytes((root / "folder" / "ant" / f"{i}.png").read_bytes())
    few = divide(str(tmp_path), tests=(str(tmp_path),))
    assert len(few.train) == 9 and few.tests == () and "its 9 pictures are too few" in few.said[0]
    nothing = divide(str(root / "folder"))  # --no_evaluation
    assert len(nothing.train) == 60 and nothing.said == ("No picture is kept to test on.",)
    with pytest.raises(SourceError, match="so none is left to train on"):
        copy = whole_of(load_source(str(root / "rows.parquet")), "test")
        without(load_source(str(root / "folder")), copy)


def test_what_a_run_trained_on_is_found_again(root, tmp_path, monkeypatch):
    spec = str(root / "folder")
    monkeypatch.chdir(root)
    relative = divide("folder", tests=("folder",)).record()
    monkeypatch.chdir(tmp_path)
    far = {"dataset": "folder", "split": "train", "division": relative}
    assert trained_on(far, divide(spec, tests=(spec,)).train)[0] == 48  # wherever it is asked from
    honest, all_rows = divide(spec, tests=(spec,)), divide(spec)
    queries = honest.tests[0][1]
    run = {"dataset": spec, "split": "train", "division": honest.record()}
    assert trained_on(run, queries) == (0, "")
    assert trained_on(run, honest.train)[0] == 48
    for other in ({**run, "division": all_rows.record()}, {"dataset": spec, "split": "train"}):  # and an old run.json
        count, sentence = trained_on(other, queries)
        assert count == 12 and "12 of the 12 pictures" in sentence and "are not a test" in sentence
    twelve = divide(str(root / "rows.parquet"), tests=(str(root / "rows.parquet"),)).tests[0][1]
    assert trained_on(run, twelve)[0] == len(pictures(twelve) & pictures(honest.train))  # copies elsewhere
    grown = {**run, "division": {**honest.record(), "of": 59}}
    assert "is not known" in trained_on(grown, queries)[1]
    unlabeled = {"dataset": str(root / "rows.parquet"), "split": "train"}
    semi = {**run, "division": {**honest.record(), "unlabeled": unlabeled}, "labeled": {"rows": [0]}}
    assert trained_on(semi, queries) == (0, "") and trained_on(semi, honest.train)[0] == 48
    assert trained_on({}, queries) == (0, "") and trained_on({"dataset": "gone/away", "split": "train"}, queries) == (
        0,
        "",
    )


def test_pictures_are_compared_however_they_are_stored(root, monkeypatch):
    folder, parquet = load_source(str(root / "folder")), load_source(str(root / "rows.parquet"))
    assert shared(folder, parquet).tolist() == list(range(60))
    arrays = np.random.default_rng(1).integers(0, 255, (12, 4, 4, 3), np.uint8)
    kind = datasets.Array3D((4, 4, 3), "uint8")
    made = datasets.Dataset.from_dict({"image": arrays}, datasets.Features(image=kind))
    assert shared(load_source(made), load_source(made.select([1, 5]))).tolist() == [1, 5]
    assert shared(load_source(made), folder).tolist() == []
    assert shared(load_source(str(root / "rows.parquet"), streaming=True), folder) is None
    monkeypatch.setattr("hf_ssl.data.same.MAX_READ", 100)
    assert shared(folder, parquet) is None and copies(folder) is None
    said: list[str] = []
    assert without(folder, parquet, said) is folder and "was not searched" in said[0]
