"""A class is its name: the same pictures score 1 however the two sides number, order or write their classes."""

import importlib
import logging

import datasets
import numpy as np
import pytest
import torch
from transformers import ResNetConfig

from hf_ssl import SimCLRConfig, SimCLRForPreTraining, SimCLRImageProcessor
from hf_ssl.data.classes import class_value, in_order, names_of
from hf_ssl.evaluation import (
    LabelMismatchError,
    classification_report,
    evaluate_backbone,
    knn_accuracy,
    linear_probe,
    low_shot,
    majority_class,
    predict,
    retrieval_recall,
    untrained,
)
from hf_ssl.training.kinds import kind_of
from tests.evaluation.toys import classifier, pictures, processor

KINDS = ["ant", "bee", "cat"]


def measure(method, views, bank, queries):
    options = {"device": "cpu", "progress": False, "max_images": None}
    return kind_of(method.reads).measure(method, views, bank, queries, options)


TRUTH = [i % 3 for i in range(18)]


def class_label(names, own=KINDS):
    return datasets.ClassLabel(names=names), [names.index(own[t]) for t in TRUTH]


DIGITS = ["0", "1", "2"]
SIDES = {  # column type and values of the same pictures
    "ClassLabel": class_label(KINDS),
    "another order": class_label(["cat", "ant", "bee"]),
    "one class more": class_label(["aardvark", *KINDS]),
    "text": (datasets.Value("string"), [KINDS[t] for t in TRUTH]),
    "digits": class_label(DIGITS, DIGITS),
    "digits in another order": class_label(["2", "0", "1"], DIGITS),
    "digits as text": (datasets.Value("string"), [DIGITS[t] for t in TRUTH]),
    "numbers": (datasets.Value("int64"), TRUTH),
}
WORDS, NUMBERS = list(SIDES)[:4], list(SIDES)[4:]
PAIRS = [(a, b) for group in (WORDS, NUMBERS, ["ClassLabel", "numbers"]) for a in group for b in group if a != b]


def source(side, name="label"):
    feature, values = SIDES[side]
    made = pictures(values, feature)  # the same pictures for every side
    if name != "label":
        made.dataset, made.labels = made.dataset.rename_column("label", name), (name,)
    return made


@pytest.fixture(scope="module")
def backbone():
    torch.set_num_threads(1)
    return untrained(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"))


@pytest.fixture(scope="module")
def method():
    backbone = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    torch.manual_seed(0)
    return SimCLRForPreTraining(SimCLRConfig(backbone_config=backbone, projection_dim=4)).eval()


@pytest.mark.parametrize("pair", PAIRS, ids=" ~ ".join)
def test_identical_pictures_have_a_1_nn_of_1(pair, backbone, method):
    bank, queries = map(source, pair)
    (row,) = evaluate_backbone(
        backbone, processor(), bank, queries, measures=("knn",), baselines=False, progress=False, k=(1,), pairing=None
    )
    assert row["knn1_label"] == 1.0
    views = SimCLRImageProcessor(size={"height": 16, "width": 16})
    same = measure(method, views, source(pair[0]), source(pair[0]))
    assert measure(method, views, bank, queries) == same and same["knn_top1"] > 0
    names = getattr(SIDES[pair[0]][0], "names", KINDS if pair[0] == "text" else DIGITS)  # a classifier of one side
    if pair == ("numbers", "ClassLabel"):  # a model that was never told a name is not asked for one
        with pytest.raises(LabelMismatchError, match="does not know: ant, bee, cat"):
            predict(classifier(names), queries, processor(), progress=False, device="cpu")
        return
    answered = predict(classifier(names), queries, processor(), progress=False, device="cpu")
    expected = [names.index((KINDS if "ant" in names else DIGITS)[t]) for t in TRUTH]
    assert answered.labels.tolist() == expected


def test_linear_and_low_shot_go_by_name_as_well(backbone):
    same, other = (
        evaluate_backbone(
            backbone, processor(), source("ClassLabel"), source(side), measures=("linear", "low_shot"),
            baselines=False, progress=False,
        )[0]
        for side in ("ClassLabel", "another order")
    )  # fmt: skip
    assert same == other


def test_a_test_set_without_the_first_class_and_a_column_of_another_name(backbone):
    names = KINDS[1:]
    rows = [i for i, t in enumerate(TRUTH) if t > 0]
    queries = pictures([0] * len(TRUTH))
    queries.dataset = source("ClassLabel").dataset.select(rows).remove_columns("label")
    labels = [names.index(KINDS[TRUTH[i]]) for i in rows]
    queries.dataset = queries.dataset.add_column("kind", labels, feature=datasets.ClassLabel(names=names))
    queries.labels = ("kind",)
    for side in ("ClassLabel", "another order", "text"):
        (row,) = evaluate_backbone(
            backbone, processor(), source(side), queries, measures=("knn",), baselines=False, progress=False, k=(1,)
        )
        assert row["knn1_label"] == 1.0


def test_sides_without_a_common_class_are_told(backbone, method, caplog):
    options = {"measures": ("knn",), "baselines": False, "progress": False}
    with pytest.raises(LabelMismatchError, match="no class of 'label' in common: the bank has ant, bee, cat"):
        evaluate_backbone(backbone, processor(), source("text"), source("digits as text"), **options)
    with caplog.at_level(logging.WARNING, "hf_ssl"):
        views = SimCLRImageProcessor(size={"height": 16, "width": 16})
        assert measure(method, views, source("text"), source("digits as text")) == {}
    assert "no class of 'label' in common" in caplog.text


def test_a_classifier_of_numbers_is_not_indexed_by_them():
    """Classes 3, 5, 7: by number row 0 would be out of range, and of classes 1, 2 every answer would be wrong."""
    found = predict(classifier(["3", "5", "7"]), pictures([3, 7, 5, -1]), processor(), progress=False, device="cpu")
    assert found.labels.tolist() == [0, 2, 1, -1]
    found = predict(classifier(["1", "2"]), pictures([1, 2]), processor(), progress=False, device="cpu")
    assert found.labels.tolist() == [0, 1]


def test_what_is_no_class():
    nothing = [None, float("nan"), np.float32("nan"), -1, -1.0, np.int64(-1), "", "-1", torch.tensor(-1)]
    assert [class_value(value) for value in nothing] == [None] * len(nothing)
    assert names_of([3, "3", 3.0, np.int64(3), True, "a"]) == ["3", "3", "3", "3", "True", "a"]
    assert names_of([1, None], ["a", "b"]) == ["b", None] == names_of([1, None], None, ["a", "b"])
    assert names_of([1], None, ["2", "1"]) == ["1"] and names_of([7], None, ["a", "b"]) == ["7"]
    assert in_order(["10", "9", "b", "a", "9"]) == ["9", "10", "a", "b"]
    with pytest.raises(ValueError, match="class number 2, but there are 2 names"):
        names_of([2], ["a", "b"])
    with pytest.raises(ValueError, match="a class is one text or number"):
        names_of([["a", "b"]])


# --- rows without a label -----------------------------------------------------------------------------------------

MISSING = {"-1": -1, "None": None, "NaN": float("nan")}


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
def test_rows_without_a_label_are_as_if_they_were_not_there(missing):
    generator = torch.Generator().manual_seed(0)
    y = [i % 3 for i in range(60)]
    centres = 0.3 * torch.randn(3, 6, generator=generator)
    bank, queries = (torch.randn(60, 6, generator=generator) + centres[y] for _ in range(2))
    half = [value if i % 2 else missing for i, value in enumerate(y)]
    for function, options in (
        (knn_accuracy, {"k": (1, 20)}),
        (linear_probe, {}),
        (low_shot, {"fractions": (0.5,)}),
        (lambda *args: retrieval_recall(args[2], args[0], args[3], args[1]), {}),
    ):
        expected = function(bank[1::2], y[1::2], queries[1::2], y[1::2], **options)
        assert function(bank, half, queries, half, **options) == expected
    numbers = torch.tensor([-1 if i % 2 == 0 else value for i, value in enumerate(y)])
    expected = knn_accuracy(bank[1::2], y[1::2], queries[1::2], y[1::2], k=5, num_classes=3)
    assert knn_accuracy(bank, numbers, queries, numbers, k=5, num_classes=3) == expected
    assert majority_class([1, 1, 2, missing, missing]) == pytest.approx(2 / 3)
    for function in (knn_accuracy, linear_probe, low_shot):
        for train, test in ((y, [missing] * 60), ([missing] * 60, y)):
            with pytest.raises(ValueError, match="has a label"):
                function(bank, train, queries, test)


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
def test_online_evaluation_and_classification_leave_them_out(missing, method, caplog):
    kind = datasets.Value("float64") if missing is MISSING["NaN"] else datasets.Value("int64")
    views = SimCLRImageProcessor(size={"height": 16, "width": 16})

    def half(values):
        return pictures([value if i % 2 else missing for i, value in enumerate(values)], kind)

    def odd(values):
        made = pictures(values)
        made.dataset = made.dataset.select(range(1, len(values), 2))
        return made

    found = measure(method, views, half(TRUTH), half(TRUTH))
    assert found == measure(method, views, odd(TRUTH), odd(TRUTH)) and found["knn_top1"] > 0
    report = predict(classifier(KINDS), half(TRUTH), processor(), progress=False, device="cpu")
    assert classification_report(report.probabilities, report.labels)["samples"] == 9
    with caplog.at_level(logging.WARNING, "hf_ssl"):
        assert measure(method, views, half(TRUTH), pictures([missing] * 6, kind)) == {}
    assert "No row has a 'label' label" in caplog.text


# --- ranks without a vote -----------------------------------------------------------------------------------------


def test_a_class_without_a_vote_has_no_rank():
    """Five neighbours of one class: by class number, classes 0 to 3 would be among the first five of every query."""
    bank, queries = torch.ones(6, 2), torch.ones(4, 2)
    labels = [7, 7, 7, 7, 7, 0]
    for truth, share in ((7, 1.0), (0, 0.0), (3, 0.0)):
        assert knn_accuracy(bank, labels, queries, [truth] * 4, k=5, num_classes=10)["knn5_top5"] == share
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(300, 8, generator=generator), torch.randn(100, 8, generator=generator)
    y, z = (torch.randint(0, 40, (n,), generator=generator) for n in (300, 100))
    renamed = torch.randperm(40, generator=generator)
    plain = knn_accuracy(bank, y, queries, z, k=(5, 20), num_classes=40)
    assert knn_accuracy(bank, renamed[y], queries, renamed[z], k=(5, 20), num_classes=40) == plain


def test_zero_shot_names_the_classes_that_only_the_bank_has(monkeypatch):
    from hf_ssl.evaluation.features import Features

    zero_shot = importlib.import_module("hf_ssl.evaluation.zero_shot")

    few = source("text")
    few.dataset = few.dataset.select([i for i, t in enumerate(TRUTH) if t > 0])
    monkeypatch.setattr(zero_shot, "class_embeddings", lambda model, processor, names, prompts: torch.eye(len(names)))
    model = type("Model", (), {"logit_scale": torch.zeros(()), "config": type("C", (), {"model_type": "clip"})})
    found = Features(torch.eye(3)[[1, 2]], {"label": ["bee", "cat"]})
    told = zero_shot.classify(model, None, few, found, "label", None, zero_shot.class_list(source("text"), "label"))
    assert told.names == tuple(KINDS) and told.labels.tolist() == [1, 2]
    assert zero_shot.classify(model, None, few, Features(torch.eye(2), found.labels), "label").names == ("bee", "cat")
