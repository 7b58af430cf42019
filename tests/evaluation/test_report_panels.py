"""What only classifiers and image-text models show: confusion, reliability, texts; and logs that hold lists."""

import itertools
import json
import re

import datasets
import numpy as np
import pytest
import torch

from hf_ssl.evaluation import charts, classification_report, save_pseudo_labels
from hf_ssl.evaluation.classifier_panels import confusion_figure, reliability_chart, worst_pairs
from hf_ssl.evaluation.report import verdict, write_report
from hf_ssl.evaluation.tables import format_table, markdown_table

from .test_report import _Page
from .test_zero_shot import make
from .test_zero_shot import pictures as text_pictures
from .toys import NAMES, classifier, pictures, processor

LOG = [
    {"step": 1, "loss": 2.0, "utilisation": 0.1, "pseudo_label_accuracy": 0.5, "pseudo_label_histogram": [0.1, 0, 0]},
    {
        "step": 2,
        "loss": 1.0,
        "utilisation": 0.3,
        "pseudo_label_accuracy": 0.7,
        "pseudo_label_histogram": [0.1, 0, 0.2],
    },
    {"step": 2, "eval_accuracy": 0.5, "eval_student_accuracy": 0.4, "eval_i2t_r1": 0.2, "eval_i2t_r1_chance": 0.01},
]


def parquet(source, path):
    source.dataset.to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def classifier_run(tmp_path_factory):
    """A classifier's run folder without a results table, on 12 pictures whose class names are hostile."""
    run = tmp_path_factory.mktemp("run")
    names = ["<b>red</b>", *NAMES[1:]]
    classifier(names).save_pretrained(run)
    processor().save_pretrained(run)
    source = pictures([0, 1, 2] * 4, datasets.ClassLabel(names=names))
    card = {"method": "fixmatch", "dataset": parquet(source, run / "pictures.parquet"), "seed": 0}
    (run / "run.json").write_text(json.dumps(card))
    (run / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return run


def test_a_classifiers_page_shows_confusion_reliability_and_pseudo_labels(classifier_run):
    text = write_report(classifier_run, progress=False).read_text(encoding="utf-8")
    found = _Page(text)
    assert not found.open and 'class="missing"' not in found.sections["confusion"]
    assert "confusion" in found.sections and "texts" not in found.sections
    assert "Confusion" in found.sections["confusion"] and "Reliability" in found.sections["confusion"]
    assert "<b>red</b>" in found.sections["confusion"] and "<b>red</b>" not in text  # as words, never as markup
    training = found.sections["training"]
    for words in ("Pseudo-labels", "utilisation", "Pseudo label histogram", "step 2, the last one", "Accuracy on the"):
        assert words in training, words
    assert "chance" not in training
    svg = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert svg and all(attributes.get("aria-label") for attributes in svg)


def test_the_recorded_table_comes_before_a_new_measurement(classifier_run, tmp_path):
    recorded = {"classes": NAMES, "confusion": [[7, 0, 0], [5, 1, 0], [0, 0, 3]], "ece": 0.125, "calibration": [
        {"confidence": 0.9, "accuracy": 0.7, "count": 16}, {"confidence": None, "accuracy": None, "count": 0},
    ]}  # fmt: skip
    rows = [{"protocol": "toys", "model": "majority class", "accuracy": 0.5},
            {"protocol": "toys", "model": "EMA weights", "accuracy": 0.7, "macro_f1": 0.6, **recorded}]  # fmt: skip
    for path in classifier_run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    card = json.loads((tmp_path / "run.json").read_text()) | {"results": rows}
    (tmp_path / "run.json").write_text(json.dumps(card))
    found = _Page(write_report(tmp_path, progress=False).read_text(encoding="utf-8")).sections
    assert "green called red (5 times)" in found["confusion"] and "(ECE) 0.125 over 16 pictures" in found["confusion"]
    assert "macro F1" in found["results"] and "confusion" not in found["results"].lower()
    assert verdict(rows)[0] == "good" and "naming the commonest class" in verdict(rows)[1][0]
    assert "confusion" not in markdown_table(rows) and "calibration" not in format_table(
        rows
    )  # lists stay in the file


def test_an_image_text_models_page_shows_texts(tmp_path):
    model, made = make("clip")
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    captions = [[f"{colour} {thing}"] for colour in ("red", "green", "<i>blue</i>") for thing in ("cat", "dog")]
    source = text_pictures(["x"] * 6, [*captions[:5], []])
    card = {"method": "clip", "dataset": parquet(source, tmp_path / "pictures.parquet"), "seed": 0}
    (tmp_path / "run.json").write_text(json.dumps(card))
    text = write_report(tmp_path, progress=False).read_text(encoding="utf-8")
    found = _Page(text)
    assert not found.open and 'class="missing"' not in text.split('id="texts"')[1].split("</section>")[0]
    assert "Among 5 different texts" in found.sections["texts"] and "red cat" in found.sections["texts"]
    assert "<i>blue</i> cat" in found.sections["texts"] and "<i>blue" not in text
    rows = re.findall(r"<tr><td>(-?[\d.]+)</td><td>(.*?)</td></tr>", text)
    similarity = [float(value) for value, _ in rows]
    assert len(rows) == 5 * 5  # the picture without a text is no query
    assert all(a >= b for a, b in itertools.pairwise(similarity[:5]))
    assert sum("✓" in cell for _, cell in rows) == 5  # all five texts are shown, so each picture's own is among them


def test_a_confusion_matrix_puts_truth_in_rows():
    matrix = np.array([[8, 2, 0], [0, 5, 0], [1, 0, 0]])
    text = confusion_figure(matrix, ["a", "b", "c"])
    assert "2 of a called b (20%)" in text and "1 of c called a (100%)" in text and "called c" not in text
    assert worst_pairs(matrix, ["a", "b", "c"]) == "Most often: a called b (2 times), c called a (1 times)."
    assert worst_pairs(np.eye(2, dtype=int), ["a", "b"]) == "It made no mistake."
    many = confusion_figure(np.ones((100, 100), int), [f"class {i}" for i in range(100)])
    assert "The 40 of 100 classes" in many and many.count("<rect") == 1600


def test_reliability_is_accuracy_over_confidence():
    p = torch.tensor([[0.95, 0.05], [0.96, 0.04], [0.6, 0.4]])
    report = classification_report(p, [0, 1, 0])
    chart = reliability_chart(report["calibration"], report["ece"])
    x, y = chart.lines["the model"]
    assert x == pytest.approx([0.6, 0.955]) and y == [1.0, 0.5]
    assert "of 67% of them" in chart.caption and "polyline" not in charts.figure(chart)


def test_bars_are_as_long_as_their_values():
    text = charts.bars("T", ["a", "b", "c"], [1.0, 0.5, 0.0], "as logged")
    lengths = [float(x) for x in re.findall(r'<rect [^>]*?width="([\d.]+)"', text)]
    assert lengths[1] == pytest.approx(lengths[0] / 2, abs=0.1) and lengths[2] == 0
    assert charts.bars("T", ["a"], [float("nan")], "") and "as logged" in text


def test_pseudo_labels_make_a_page_of_their_own_data(classifier_run, tmp_path):
    """A report can show the file that pseudo-label wrote: its label column is read as any other."""
    from hf_ssl.data.sources import load_source
    from hf_ssl.evaluation import pseudo_label

    source = load_source(str(classifier_run / "pictures.parquet"))
    file = save_pseudo_labels(pseudo_label(str(classifier_run), source, progress=False, device="cpu"), tmp_path / "p")
    report = write_report(classifier_run, dataset=str(file), progress=False).read_text(encoding="utf-8")
    assert "It made no mistake." in _Page(report).sections["confusion"]  # judged by its own labels
