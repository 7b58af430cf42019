"""The table of a whole evaluation, and the packaged metrics loaded by path with no network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BitImageProcessor, ResNetConfig, ViTConfig

from hf_ssl.data.sources import load_source
from hf_ssl.evaluation import (
    MEASURES,
    evaluate_backbone,
    extract_features,
    format_table,
    knn_accuracy,
    markdown_table,
    metric_path,
    print_table,
    untrained,
)
from tests import PATIENCE


def _processor() -> BitImageProcessor:
    square = {"height": 32, "width": 32}
    return BitImageProcessor(size={"shortest_edge": 32}, crop_size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def test_emoji_table_has_raw_pixels_and_the_untrained_twin_beside_the_model():
    train, test = load_source("emoji:placed", "train"), load_source("emoji:placed", "test")
    model = untrained(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=8,
        ),
        seed=5,
    )
    options = {"progress": False, "max_images": 150, "measures": MEASURES, "labels": ("group",), "k": (5, 20)}
    rows = evaluate_backbone(model, _processor(), train, test, **options)
    assert [(row["protocol"], row["model"]) for row in rows] == [
        ("placed", "raw pixels"),
        ("placed", "untrained"),
        ("placed", "trained"),
    ]
    common = {"protocol", "model", "knn5_group", "knn20_group", "linear_group", "r1", "r5"} | {
        "lowshot1_group",
        "lowshot10_group",
    }
    assert set(rows[0]) == common
    assert set(rows[1]) == set(rows[2]) == common | {"std", "rankme", "jaccard_best", "jaccard_mean"}
    assert rows[1]["std"] != rows[2]["std"]  # the twin has other weights
    bank, queries = (extract_features(model, s, _processor(), progress=False, max_images=150) for s in (train, test))
    labels = bank.labels["group"], queries.labels["group"]
    expected = knn_accuracy(bank.embeddings, labels[0], queries.embeddings, labels[1], k=(5, 20))
    assert rows[2]["knn5_group"] == expected["knn5_top1"] and rows[2]["knn20_group"] == expected["knn20_top1"]


def test_a_labelled_folder_and_a_model_without_attention(tmp_path, caplog):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, n in (("train", 8), ("test", 3)):
        for label, base in (("dark", 10), ("light", 200)):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(n):
                array = (base + rng.integers(0, 40, (24, 24, 3))).astype(np.uint8)
                Image.fromarray(array).save(tmp_path / split / label / f"{i}.png")
    train, test = load_source(str(tmp_path), "train"), load_source(str(tmp_path), "test")
    model = untrained(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"))
    (row,) = evaluate_backbone(
        model, _processor(), train, test, measures=MEASURES, baselines=False, progress=False, k=(3,), protocol="tones"
    )
    low_shot = {"lowshot1_label", "lowshot10_label"}
    assert set(row) == {"protocol", "model", "knn3_label", "linear_label", "std", "rankme"} | low_shot
    assert row["protocol"] == "tones" and row["linear_label"] == 1.0
    assert "foreground mask" in caplog.text  # opaque photographs: a sentence, not a crash
    with pytest.raises(ValueError, match="Unknown measure 'knm'"):
        evaluate_backbone(model, _processor(), train, test, measures=("knm",))
    with pytest.raises(ValueError, match="'species'"):
        evaluate_backbone(model, _processor(), train, test, labels=("species",), baselines=False, progress=False)


def test_tables(capsys):
    rows = [{"model": "raw pixels", "knn20": 0.5}, {"model": "trained", "knn20": 0.6251, "rankme": 81.23, "k": 20}]
    expected = "\n".join(
        [
            "model       knn20  rankme   k",
            "----------  -----  ------  --",
            "raw pixels  0.500       -   -",
            "trained     0.625    81.2  20",
        ]
    )
    assert format_table(rows) == expected
    print_table(rows)
    assert capsys.readouterr().out == expected + "\n"
    assert markdown_table(rows, ["model", "knn20"]).splitlines() == [
        "| model | knn20 |",
        "| --- | ---: |",
        "| raw pixels | 0.500 |",
        "| trained | 0.625 |",
    ]


_LOAD_ALL = """
import evaluate
from pathlib import Path
from hf_ssl.evaluation import metric_path
eye = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]
bank = {"train_features": eye, "train_labels": [0, 1, 0, 1]}
calls = {
    "knn_accuracy": dict(predictions=eye, references=[0, 1, 0, 0], k=[1], **bank),
    "linear_probe": dict(predictions=eye, references=[0, 1, 0, 1], **bank),
    "retrieval_recall": dict(predictions=eye, references=[0, 1, 2, 9], gallery=eye, gallery_ids=[0, 1, 3, 2], k=[1]),
    "rankme": dict(predictions=eye),
    "feature_std": dict(predictions=eye),
    "uniformity": dict(predictions=eye[:1] + eye[2:3]),
    "alignment": dict(predictions=eye[:2], references=eye[1:3]),
    "attention_jaccard": dict(predictions=[[[0.9, 0.1, 0.0, 0.0]]], references=[[[1, 0], [0, 0]]]),
}
folder = Path(metric_path("rankme")).parent
assert {p.name for p in folder.iterdir() if (p / f"{p.name}.py").exists()} == set(calls), sorted(folder.iterdir())
for name, arguments in calls.items():
    result = evaluate.load(metric_path(name)).compute(**arguments)
    print(name, sorted((k, round(v, 3) if isinstance(v, float) else v) for k, v in result.items()))
"""


def test_packaged_metrics_load_by_path_offline(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_ALL],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["knn_accuracy"] == "[('knn1_top1', 0.75), ('knn1_top5', 0.75)]"
    assert lines["retrieval_recall"] == "[('r1', 0.667)]"
    assert lines["rankme"] == "[('rankme', 2.0)]"
    assert lines["feature_std"] == "[('feature_std', 0.707)]"
    assert lines["uniformity"] == "[('uniformity', -8.0)]"
    assert lines["alignment"] == "[('alignment', 2.0)]"
    assert lines["attention_jaccard"] == "[('jaccard_best', 1.0), ('jaccard_mean', 1.0)]"
    assert "('solver', 'lbfgs')" in lines["linear_probe"]
    with pytest.raises(ValueError, match="rankme"):
        metric_path("rank")
