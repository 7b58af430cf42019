"""Classifiers: every figure by hand and by scikit-learn, labels by name, and the low-shot probe."""

import copy
import io
import math

import datasets
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
import torch
from PIL import Image
from transformers import pipeline

from hf_ssl.evaluation import (
    LabelMismatchError,
    classification_report,
    evaluate_backbone,
    load_native,
    low_shot,
    majority_class,
    model_kind,
    natural_measures,
    predict,
)
from hf_ssl.evaluation.low_shot import stratified_rows

from .toys import NAMES, classifier, pictures, processor

# --- figures ----------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    p = np.array([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.2, 0.8, 0], [0.5, 0.3, 0.2]])
    found = classification_report(p, [0, 1, 1, 0], NAMES)
    assert found["accuracy"] == 0.75 and found["samples"] == 4
    assert found["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert found["per_class_recall"] == {"red": 1.0, "green": 0.5, "blue": None}
    # blue occurs nowhere: F1 of red is 2·2/(2+3), of green 2·1/(2+1)
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    # confidences .9 right, .6 wrong, .8 right, .5 right, each in a bin of its own
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.5) / 4)
    assert "top5" not in found  # trap 12: three classes have no top five
    assert sum(b["count"] for b in found["calibration"]) == 4 and len(found["calibration"]) == 15


def test_a_bin_is_open_below_and_closed_above():
    p = torch.tensor([[1 / 15 * 9, 1 - 1 / 15 * 9], [0.61, 0.39], [1.0, 0.0]])  # 0.6 belongs to bin 9 of 1..15
    counts = [b["count"] for b in classification_report(p, [0, 0, 0])["calibration"]]
    assert counts[8] == 1 and counts[9] == 1 and counts[14] == 1 and sum(counts) == 3


@pytest.mark.parametrize("classes", [2, 4, 6, 12])
def test_figures_agree_with_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    p = rng.dirichlet(np.ones(classes), 200).astype(np.float32)
    y = rng.integers(0, max(2, classes - 2), 200)  # some classes have no example
    found = classification_report(torch.from_numpy(p), torch.from_numpy(y))
    guess = p.argmax(1)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(y, guess))
    assert found["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(y, guess, average="macro", zero_division=0))
    assert found["confusion"] == sklearn.metrics.confusion_matrix(y, guess, labels=range(classes)).tolist()
    if classes > 5:
        top5 = sklearn.metrics.top_k_accuracy_score(y, p, k=5, labels=range(classes))
        assert found["top5"] == pytest.approx(top5)
    assert ("top5" in found) == (classes > 5)
    at = np.ceil(p.max(1).astype(np.float64) * 15).astype(int)
    bins = [(p.max(1)[at == b].mean() - (guess == y)[at == b].mean(), (at == b).sum()) for b in set(at)]
    assert found["ece"] == pytest.approx(sum(abs(gap) * n for gap, n in bins) / 200, abs=1e-6)


def test_unlabelled_rows_are_left_out_and_nonsense_is_refused():
    p = [[0.9, 0.1], [0.2, 0.8]]
    assert classification_report(p, [0, -1])["samples"] == 1
    assert majority_class([2, 2, 1, None, -1]) == pytest.approx(2 / 3)
    for bad, words in ((([[2.0, -1.0]], [0]), "softmax"), ((p, [0]), "shapes"), ((p, [-1, -1]), "No row"),
                       ((p, [0, 2]), "2 classes")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            classification_report(np.array(bad[0]), bad[1])


# --- predictions ------------------------------------------------------------------------------------------------


def test_probabilities_are_the_pipelines_and_a_broken_picture_is_left_out(tmp_path):
    model, source = classifier(), pictures([0, 1, 2, 0, 1], datasets.ClassLabel(names=NAMES), bad=(3,))
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    found = predict(str(tmp_path), source, progress=False, device="cpu", batch_size=2)
    assert found.probabilities.shape == (4, 3) and found.probabilities.dtype == torch.float32
    assert found.index.tolist() == [0, 1, 2, 4] and found.labels.tolist() == [0, 1, 2, 1]
    assert found.names == tuple(NAMES) and len(found.skipped) == 1 and "3.png" in found.skipped[0]
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu", top_k=None)
    for row, index in zip(found.probabilities, found.index.tolist(), strict=True):
        picture = Image.open(io.BytesIO(source.dataset[index]["image"]["bytes"]))
        expected = {answer["label"]: answer["score"] for answer in classify(picture)}
        assert row.tolist() == pytest.approx([expected[name] for name in NAMES], abs=1e-6)


def test_labels_go_by_name_not_by_number():
    """The data counts its classes in another order than the model; by number nearly all would be wrong."""
    model = classifier()
    shuffled = datasets.ClassLabel(names=["blue", "red", "green"])
    numbered = predict(model, pictures([0, 1, 2], shuffled), processor(), progress=False)
    assert numbered.labels.tolist() == [2, 0, 1]
    texts = predict(model, pictures(["green", "red", None], datasets.Value("string")), processor(), progress=False)
    assert texts.labels.tolist() == [1, 0, -1]
    plain = predict(model, pictures([2, -1, 0]), processor(), progress=False)
    assert plain.labels.tolist() == [2, -1, 0]
    nameless = predict(classifier(None, 3), pictures([0, 1, 2], shuffled), processor(), progress=False)
    assert nameless.labels.tolist() == [0, 1, 2] and nameless.names == ("blue", "red", "green")


@pytest.mark.parametrize(
    ("names", "labels", "feature", "words"),
    [
        (NAMES, [0, 1], datasets.ClassLabel(names=["cat", "red"]), "does not know: cat"),
        (NAMES, ["rot", "red"], datasets.Value("string"), "does not know: rot"),
        (None, ["a", "b"], datasets.Value("string"), "set id2label"),
        (None, [0, 1], datasets.ClassLabel(names=["a", "b"]), "has 2 classes, the model 3"),
        (NAMES, [0, 7], None, "label 7"),
    ],
)
def test_labels_that_do_not_match_are_told(names, labels, feature, words):
    with pytest.raises(LabelMismatchError, match=words):
        predict(classifier(names, 3), pictures(labels, feature), processor(), progress=False)


def test_prediction_leaves_the_model_as_it_was():
    model = classifier().train()
    before = copy.deepcopy(model.state_dict())
    predict(model, pictures([0, 1, 2, 0]), processor(), progress=False)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_what_a_model_is(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    assert model_kind(model) == model_kind(tmp_path) == "classifier"
    assert model_kind(model.resnet) == "backbone" and natural_measures(str(tmp_path))[0] == "classification"
    loaded, _, kind = load_native(str(tmp_path), device="cpu")
    assert kind == "classifier" and torch.equal(loaded.classifier[1].weight, model.classifier[1].weight)
    with pytest.raises(ValueError, match="no image classifier"):
        predict(model.resnet, pictures([0, 1]), processor(), progress=False)


def test_the_table_of_a_classifier():
    model, last = classifier(), classifier(seed=5)
    source = pictures([0, 1, 2, 0, 0, 1] * 4, datasets.ClassLabel(names=NAMES))
    options = {"progress": False, "k": (3,), "measures": ("classification", "knn", "low_shot"), "protocol": "toys"}
    rows = evaluate_backbone(
        model, processor(), source, source, name="EMA weights", others={"last weights": last}, **options
    )
    assert [row["model"] for row in rows] == [
        "majority class", "raw pixels", "untrained", "last weights", "EMA weights",
    ]  # fmt: skip
    table = {row["model"]: row for row in rows}
    assert table["majority class"] == {"protocol": "toys", "model": "majority class", "accuracy": 0.5}
    for name, twin in (("EMA weights", model), ("last weights", last)):
        found = predict(twin, source, processor(), progress=False)
        assert table[name]["accuracy"] == (found.probabilities.argmax(1) == found.labels).double().mean().item()
        assert np.array(table[name]["confusion"]).sum() == 24 and table[name]["classes"] == NAMES
    assert {"knn3_label", "lowshot1_label", "lowshot10_label"} <= set(table["EMA weights"]) & set(table["raw pixels"])
    assert "knn3_label" not in table["last weights"] and "accuracy" not in table["untrained"]


def test_what_does_not_fit_the_model_is_left_out_and_said(caplog):
    source = pictures([0, 1, 2, 0, 0, 1], datasets.ClassLabel(names=NAMES))
    options = {"progress": False, "measures": ("zero_shot", "text_retrieval", "health"), "baselines": False}
    (row,) = evaluate_backbone(classifier(), processor(), source, source, **options)
    assert set(row) == {"protocol", "model", "std", "rankme"} and "no text tower" in caplog.text


# --- low-shot ---------------------------------------------------------------------------------------------------


def test_a_draw_is_stratified_with_at_least_one_of_each():
    y = torch.tensor([0] * 100 + [1] * 40 + [2])
    rows = stratified_rows(y, 0.1, seed=3)
    assert y[rows].bincount().tolist() == [10, 4, 1]
    assert torch.equal(rows, stratified_rows(y, 0.1, seed=3)) and not torch.equal(rows, stratified_rows(y, 0.1, 4))


def test_low_shot_agrees_with_scikit_learns_logistic_regression():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 12, generator=generator)
    y = torch.arange(400) % 4
    x = centres[y] + 1.5 * torch.randn(400, 12, generator=generator) + 3
    test_y = torch.arange(200) % 4
    # test lies elsewhere: centring it by its own mean, not by the drawn rows', would change the answers
    test_x = centres[test_y] + 1.5 * torch.randn(200, 12, generator=generator) + torch.linspace(2, 5, 12)
    found = low_shot(x, y, test_x, test_y, fractions=(0.01, 0.1), draws=2, seed=7)
    for key, fraction in (("lowshot1", 0.01), ("lowshot10", 0.1)):
        scores = []
        for seed in (7, 8):
            rows = stratified_rows(y, fraction, seed)
            mean = x[rows].mean(0)
            fit, test = (torch.nn.functional.normalize(v - mean, dim=1).double().numpy() for v in (x[rows], test_x))
            model = sklearn.linear_model.LogisticRegression(C=1 / (0.0025 * len(rows)), tol=1e-8, max_iter=1000)
            scores.append((model.fit(fit, y[rows].numpy()).predict(test) == test_y.numpy()).mean())
        assert found[key] == pytest.approx(np.mean(scores), abs=0.011)  # one or two pictures at the border
    assert found["lowshot10"] > found["lowshot1"] > 0.3


def test_low_shot_never_looks_at_test_labels():
    """Trap 14's cousin: the probe and its one setting are the same whatever the test labels are."""
    generator = torch.Generator().manual_seed(1)
    x, y, test = torch.randn(60, 5, generator=generator), torch.arange(60) % 2, torch.randn(40, 5, generator=generator)
    one = low_shot(x, y, test, torch.zeros(40, dtype=torch.long))
    other = low_shot(x, y, test, torch.ones(40, dtype=torch.long))
    assert all(math.isclose(one[key] + other[key], 1) for key in one)  # the same answers, judged by opposite truths
    for arguments, words in (
        ((x, y[:-1], test, test[:, 0]), "labels"),
        ((x, torch.zeros(60), test, torch.zeros(40)), "2 classes"),
    ):
        with pytest.raises(ValueError, match=words):
            low_shot(*arguments)
    with pytest.raises(ValueError, match="fractions"):
        low_shot(x, y, test, torch.zeros(40), fractions=(1.5,))
