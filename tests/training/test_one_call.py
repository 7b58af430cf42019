"""hf_ssl.fit: datasets in, a native classifier and a report out."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

import hf_ssl

SMALL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def colours(count: int, seed: int) -> Dataset:
    """Noisy 16 px squares, red or blue, half each."""
    rng = np.random.default_rng(seed)
    classes = [i % 2 for i in range(count)]
    images = [
        np.clip(rng.normal((190, 60, 60) if c == 0 else (60, 60, 190), 40, (16, 16, 3)), 0, 255) for c in classes
    ]
    features = Features(picture=Image(), kind=ClassLabel(names=["red", "blue"]))
    rows = {"picture": [image.astype(np.uint8) for image in images], "kind": classes}
    return Dataset.from_dict(rows, features=features)


ARGUMENTS = {
    "max_steps": 12, "per_device_train_batch_size": 4, "unlabeled_ratio": 2, "image_size": 16, "learning_rate": 0.05,
    "labels_per_class": 4, "config": {"ema_momentum": 0.5, "threshold": 0.6}, "use_cpu": True, "disable_tqdm": True,
    "report_to": [], "logging_steps": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def report():
    torch.set_num_threads(1)
    model = ResNetForImageClassification(ResNetConfig(**SMALL, num_labels=5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unlabeled = colours(24, 1).remove_columns("kind").rename_column("picture", "photo")
    found = hf_ssl.fit(model, labeled=colours(40, 0), unlabeled=unlabeled, validation=colours(20, 2), **ARGUMENTS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


def test_the_report_has_the_model_its_figures_and_its_history(report):
    assert isinstance(report.model, ResNetForImageClassification) and not report.model.training
    assert report.model.config.id2label == {0: "red", 1: "blue"}
    assert report.validation["accuracy"] > 0.9  # two colours; guessing gives .5
    assert {"macro_f1", "ece", "student_accuracy"} <= set(report.validation)
    assert [entry["step"] for entry in report.history if "utilisation" in entry] == [4, 8, 12]
    assert report.history[0]["learning_rate"] > 0.03  # the 0.05 that was asked for, not the paper's 0.03
    assert len(report.labeled.rows) == 8 and report.labeled.names == ("red", "blue")
    text = str(report)
    assert "EMA" in text and "8 labels of 2 classes" in text and "student" not in text


def test_it_saves_what_plain_transformers_loads(report, tmp_path):
    report.save(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and loaded.config.label2id == {"red": 0, "blue": 1}
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images).logits, report.model(images).logits)
    assert "8 labels" in (tmp_path / "README.md").read_text()


def test_pseudo_labels_go_out_and_come_back(report, tmp_path):
    images = colours(10, 3)
    made = report.pseudo_labels(images, threshold=0.5, progress=False)
    assert {"image", "label", "confidence", "weight"} <= set(made.column_names) and len(made) == 10
    assert made.features["label"].names == ["red", "blue"]
    right = np.mean(np.array(made["label"]) == np.array(images["kind"]))
    assert right > 0.7
    hf_ssl.save_pseudo_labels(made, tmp_path / "pseudo.parquet")
    again = hf_ssl.load_pseudo_labels(tmp_path / "pseudo.parquet")
    assert again["label"] == made["label"] and again["confidence"] == made["confidence"]


def test_a_preset_without_unlabelled_or_validation_images():
    found = hf_ssl.fit("resnet-nano", colours(40, 0), **{**ARGUMENTS, "max_steps": 1})
    assert found.validation == {} and found.model.config.num_labels == 2


def test_it_refuses_in_words():
    with pytest.raises(ValueError, match="fit trains semi-supervised methods"):
        hf_ssl.fit("resnet-nano", colours(8, 0), method="simclr")
    with pytest.raises(ValueError, match="no label column"):
        hf_ssl.fit("resnet-nano", colours(8, 0).remove_columns("kind"))
    with pytest.raises(ValueError, match="fewer than the 9 per class"):
        hf_ssl.fit("resnet-nano", colours(8, 0), labels_per_class=9)
