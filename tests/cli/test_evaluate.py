"""evaluate and pseudo-label as a user types them: runs of classifiers, image-text folders, and what they are told."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ssl.cli import main

NAMES = ["blue", "red"]
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic",
    "downsample_in_first_stage": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes told apart by colour, with a test split and a text beside each picture."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 8)):
        for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture = np.clip(rng.integers(-40, 40, (16, 16, 3)) + colour, 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(root / split / name / f"{i}.png")
                (root / split / name / f"{i}.txt").write_text(f"a {name} thing number {i}\n")
    return root


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run of FixMatch as it is exported; its EMA says "blue" to all, its last weights "red"."""
    from hf_ssl.hub import export
    from hf_ssl.methods import load

    method = load("fixmatch")
    torch.manual_seed(0)
    backbone = {**RESNET, "id2label": dict(enumerate(NAMES))}
    model = method(method.config_class(backbone_config=backbone)).eval()
    with torch.no_grad():
        model.ema.classifier[1].bias.copy_(torch.tensor([50.0, 0.0]))
        model.backbone.classifier[1].bias.copy_(torch.tensor([0.0, 50.0]))
    folder = tmp_path_factory.mktemp("runs") / "fixmatch"
    export(model, method.processor_class(size=16), folder)
    return folder


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch):
    monkeypatch.delenv("HF_SSL_DEBUG", raising=False)


def evaluate(*argv, code=0):
    assert main(["evaluate", *map(str, argv), "--device", "cpu"]) == code


def rows_of(tmp_path, *argv):
    evaluate(*argv, "--json", tmp_path / "rows.json")
    return {row["model"]: row for row in json.loads((tmp_path / "rows.json").read_text())}


def test_a_run_shows_both_weights_and_the_commonest_class(run_folder, pictures, tmp_path, capsys):
    rows = rows_of(tmp_path, run_folder, "--dataset", pictures, "--protocols", "classification")
    assert list(rows) == ["majority class", "last weights", "EMA weights"]
    assert rows["EMA weights"]["confusion"] == [[8, 0], [8, 0]]  # rows are the truth, in the model's order
    assert rows["last weights"]["confusion"] == [[0, 8], [0, 8]]
    assert rows["majority class"]["accuracy"] == rows["EMA weights"]["accuracy"] == 0.5
    assert rows["EMA weights"]["per_class_recall"] == {"blue": 1.0, "red": 0.0}
    out = capsys.readouterr().out
    for word in ("EMA weights", "last weights", "macro_f1", "ece"):
        assert word in out, word
    assert "confusion" not in out and "top5" not in out


def test_a_classifier_is_measured_by_what_suits_it(run_folder, pictures, tmp_path):
    rows = rows_of(tmp_path, run_folder, "--dataset", pictures, "--k", "3")
    assert list(rows) == ["majority class", "raw pixels", "untrained", "last weights", "EMA weights"]
    assert {"accuracy", "ece", "knn3_label", "linear_label", "std"} <= set(rows["EMA weights"])
    assert rows["raw pixels"]["knn3_label"] == 1.0


def test_the_last_weights_of_a_folder_without_ssl_are_not_invented(run_folder, pictures, tmp_path):
    import shutil

    shutil.copytree(run_folder, tmp_path / "root", ignore=shutil.ignore_patterns("ssl"))
    rows = rows_of(tmp_path, tmp_path / "root", "--dataset", pictures, "--protocols", "classification")
    assert list(rows) == ["majority class", "trained"]
    again = rows_of(tmp_path, run_folder / "ssl", "--dataset", pictures, "--protocols", "classification")
    assert list(again) == ["majority class", "last weights", "EMA weights"]  # a checkpoint holds the whole method
    assert again["EMA weights"]["confusion"] == rows["trained"]["confusion"]


def test_pictures_of_other_classes(run_folder, pictures, tmp_path, capsys):
    other = tmp_path / "other"
    for name in ("cats", "dogs"):
        (other / name).mkdir(parents=True)
        for i in range(10):
            (other / name / f"{i}.png").write_bytes((pictures / "test" / "red" / f"{i % 8}.png").read_bytes())
    argv = [run_folder, "--dataset", other, "--k", "3"]
    evaluate(*argv, "--protocols", "classification,knn", code=1)
    assert "classes that the model does not know: cats, dogs" in capsys.readouterr().err
    rows = rows_of(tmp_path, *argv)  # nobody asked for accuracy: the rest is measured, and why is said
    assert "Not classified" in capsys.readouterr().out
    assert list(rows) == ["raw pixels", "untrained", "trained"] and "knn3_label" in rows["trained"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    from transformers import CLIPTextConfig

    from hf_ssl.backbones import two_towers
    from hf_ssl.hub import export
    from hf_ssl.methods import load
    from hf_ssl.processing import tokenizers

    words = tokenizers.train_tokenizer([f"a red blue thing number {i}" for i in range(12)], 560, 16)
    tower = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    vision = {
        "model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32,
    }  # fmt: skip
    method = load("clip")
    torch.manual_seed(0)
    towers = two_towers.image_text_config(vision, tower, words, projection_dim=8).to_dict()
    model = method(method.config_class(backbone_config=towers)).eval()
    folder = tmp_path_factory.mktemp("runs") / "clip"
    export(model, method.processor_class(tokenizer=words, size=16), folder)
    return folder


def test_an_image_text_model_is_measured_by_what_suits_it(clip_folder, pictures, tmp_path, capsys):
    rows = rows_of(tmp_path, clip_folder, "--dataset", pictures, "--k", "3")
    assert list(rows) == ["majority class", "chance", "raw pixels", "untrained", "trained"]
    assert {"zeroshot_label", "i2t_r1", "t2i_r10", "knn3_label", "std"} <= set(rows["trained"])
    assert rows["chance"]["i2t_r1"] == pytest.approx(1 / 16) and rows["majority class"]["zeroshot_label"] == 0.5
    (tmp_path / "prompts.json").write_text(json.dumps({"classes": {"red": ["red thing"], "blue": ["blue thing"]}}))
    argv = [clip_folder, "--dataset", pictures, "--protocols", "zero_shot", "--prompts"]
    described = rows_of(tmp_path, *argv, tmp_path / "prompts.json")
    assert list(described) == ["majority class", "untrained", "trained"]
    (tmp_path / "prompts.json").write_text(json.dumps({"classes": {"rot": ["red thing"], "blue": ["blue thing"]}}))
    capsys.readouterr()
    evaluate(*argv, tmp_path / "prompts.json", code=1)
    assert "describe 'rot', which is no class of the data" in capsys.readouterr().err


def test_pictures_with_texts_need_no_labels(clip_folder, pictures, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted((pictures / "train").rglob("*")):
        if path.is_file():
            (flat / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    rows = rows_of(tmp_path, clip_folder, "--dataset", flat)
    assert {"i2t_r1", "t2i_r1"} <= set(rows["trained"]) and "zeroshot_label" not in rows["trained"]
    evaluate(clip_folder, "--dataset", flat, "--protocols", "knn", code=1)
    assert "has no labels to evaluate with" in capsys.readouterr().err


def test_pseudo_labels_of_a_folder(run_folder, pictures, tmp_path, capsys):
    from hf_ssl.data import load_source
    from hf_ssl.evaluation import load_pseudo_labels

    output = tmp_path / "labels.parquet"
    argv = ["pseudo-label", str(run_folder), "--dataset", str(pictures), "--output", str(output), "--device", "cpu"]
    assert main([*argv, "--threshold", "0.9"]) == 0
    found = load_pseudo_labels(output)
    assert len(found) == 24 and set(found["label"][:]) == {0} and set(found["weight"][:]) == {1.0}
    assert load_source(str(output)).labels == ("label",)
    out = capsys.readouterr().out
    assert "24 of them with confidence 0.9 or more" in out and "24  blue" in out and "0  red" in out
    for extra, words in (
        (["--threshold", "1.2"], "--threshold must be from 0 to 1"),
        (["--output", str(tmp_path / "x.csv")], "ends in .parquet"),
        (["--keep", "sure"], "--keep"),
    ):
        assert main([*argv, *extra]) == 2
        assert words in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["labels.parquet"]
