"""Pseudo-labels from a classifier to a file and back, as a stranger's loop and our own data layer read them."""

import datasets
import numpy as np
import pytest
import torch

from hf_ssl.data.sources import load_source
from hf_ssl.evaluation import load_pseudo_labels, predict, pseudo_label, save_pseudo_labels

from .toys import NAMES, classifier, pictures, processor

HIDDEN = [0, 1, 2, 0, 1, 2]  # true labels, which pseudo-labels must not show


def labelled(**options):
    source = pictures(HIDDEN, bad=(2,))
    return source, pseudo_label(classifier(), source, processor(), progress=False, **options)


def test_columns_and_order():
    source, found = labelled(threshold=0.0)
    assert list(found.features) == ["image", "label", "confidence", "weight", "index"]
    assert found.features["label"].names == NAMES and found.features["confidence"].dtype == "float32"
    assert found.features["weight"].dtype == "float32" and isinstance(found.features["image"], datasets.Image)
    assert found["index"][:] == [0, 1, 3, 4, 5]  # the broken picture has no row
    expected = predict(classifier(), source, processor(), progress=False)
    assert found["label"][:] == expected.probabilities.argmax(1).tolist()
    assert torch.equal(torch.tensor(found["confidence"][:]), expected.probabilities.max(1).values)
    assert found["weight"][:] == [1.0] * 5
    assert [row["image"] for row in found] == [source.dataset[i]["image"] for i in (0, 1, 3, 4, 5)]


def test_threshold_weight_and_keep():
    confidences = labelled()[1]["confidence"][:]
    threshold = sorted(confidences)[2]
    at_least = [float(c >= threshold) for c in confidences]
    assert 0 < sum(at_least) < 5
    assert labelled(threshold=threshold)[1]["weight"][:] == at_least  # a confidence of exactly the threshold counts
    kept = labelled(threshold=threshold, keep="confident")[1]
    assert kept["confidence"][:] == [c for c in confidences if c >= threshold] and set(kept["weight"][:]) == {1.0}
    own = labelled(weight=lambda c: c**2)[1]
    assert own["weight"][:] == pytest.approx([c**2 for c in confidences])
    for options, words in (
        ({"threshold": 1.5}, "threshold"),
        ({"keep": "some"}, "keep"),
        ({"weight": lambda c: c[:2]}, "one finite number"),
        ({"weight": lambda c: c * np.nan}, "one finite number"),
    ):
        with pytest.raises(ValueError, match=words):
            labelled(**options)


def test_labels_of_foreign_classes_do_not_disturb():
    source = pictures([0, 1, 0], datasets.ClassLabel(names=["something", "else"]))
    assert len(pseudo_label(classifier(), source, processor(), progress=False)) == 3


@pytest.mark.parametrize("target", ["labels.parquet", "folder"])
def test_there_and_back(tmp_path, target):
    source, found = labelled(threshold=0.4)
    file = save_pseudo_labels(found, tmp_path / target)
    assert file.suffix == ".parquet" and [p.name for p in file.parent.iterdir()] == [file.name]
    back = load_pseudo_labels(tmp_path / target)
    assert back.features == found.features and back.to_dict() == found.to_dict()
    ours = load_source(str(tmp_path / target))
    assert "label" in ours.labels and len(ours) == 5
    assert np.array_equal(ours.image(ours.dataset[2], 2), source.image(source.dataset[3], 3))
    loop = back.cast_column("image", datasets.Image())  # a stranger's loop
    first = next(iter(torch.utils.data.DataLoader(loop, batch_size=2, collate_fn=list)))
    assert first[0]["image"].size == (16, 16) and first[0]["label"] == found[0]["label"]


def test_pictures_that_are_files_are_stored(tmp_path):
    source = pictures([0, 1])
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, row in enumerate(source.dataset):
        (folder / f"{i}.png").write_bytes(row["image"]["bytes"])
    found = pseudo_label(classifier(), load_source(str(folder)), processor(), progress=False)
    save_pseudo_labels(found, tmp_path / "labels.parquet")
    for i in range(2):
        (folder / f"{i}.png").unlink()
    back = load_pseudo_labels(tmp_path / "labels.parquet")
    assert isinstance(back.features["image"], datasets.Image)
    assert [row["image"] for row in back] == [
        {"bytes": row["image"]["bytes"], "path": f"{i}.png"} for i, row in enumerate(source.dataset)
    ]


def test_what_is_no_file_of_pseudo_labels_is_told(tmp_path):
    _, found = labelled()
    with pytest.raises(ValueError, match="lacks the column 'confidence'"):
        save_pseudo_labels(found.remove_columns("confidence"), tmp_path / "x.parquet")
    found.remove_columns("weight").to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet lacks the column 'weight'"):
        load_pseudo_labels(tmp_path / "other.parquet")
    found.cast_column("label", datasets.Value("int64")).to_parquet(tmp_path / "nameless.parquet")
    with pytest.raises(ValueError, match="has no class names"):
        load_pseudo_labels(tmp_path / "nameless.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        load_pseudo_labels(tmp_path / "broken.parquet")
    with pytest.raises(FileNotFoundError, match="no pseudo-labels"):
        load_pseudo_labels(tmp_path / "nowhere")
    stream = pictures([0, 1])
    stream.dataset = stream.dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="stream"):
        pseudo_label(classifier(), stream, processor(), progress=False)
