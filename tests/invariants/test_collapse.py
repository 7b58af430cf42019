"""A small real run must not collapse: embeddings of unseen pictures keep spread and rank, targets keep their entropy.

MAE has nothing to collapse: tests/methods/test_mae.py learns an image by heart. Bounds come from runs over seeds
0, 1, 2; the same measures are shown to catch the two ways DINO collapses.
"""

import math

import pytest
import torch

from hf_ssl.evaluation import feature_std, rankme
from hf_ssl.modeling import SSLModel
from tests.contract.tiny import build, pictures, processor

RESNET = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1],
    "layer_type": "basic",
}  # fmt: skip
DINO = {
    "out_dim": 64, "hidden_dim": 64, "bottleneck_dim": 16, "teacher_momentum": 0.9, "teacher_temperature": 0.04,
}  # fmt: skip
GENTLE = {  # views that a net of this size can tell apart after a few dozen steps
    "scale": [0.6, 1.0], "jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0,
}  # fmt: skip
STEPS, BATCH = 40, 32


def train(name: str, seed: int, backbone: dict, lr: float = 2e-3, **fields) -> tuple[SSLModel, list[dict[str, float]]]:
    """STEPS optimiser steps on smooth random pictures; the model and what each step logged."""
    model = build(name, backbone, seed=seed, **fields)
    model.total_steps.fill_(STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.04)
    views = processor(name, **GENTLE)
    bank = pictures(4 * BATCH, seed=seed)
    logged = []
    for step in range(STEPS):
        rows = torch.randint(len(bank), (BATCH,)).tolist()
        optimizer.zero_grad()
        index = {"index": torch.tensor(rows)} if model.needs_index else {}
        output = model(**views([bank[row] for row in rows], seed=1000 * seed + step), **index)
        output.loss.backward()
        model.before_optimizer_step(step / STEPS)
        optimizer.step()
        model.after_optimizer_step()
        logged.append(
            {key: float(value.detach()) for key, value in {"loss": output.loss, **(output.metrics or {})}.items()}
        )
    return model, logged


def health(model: SSLModel) -> tuple[float, float]:
    """Spread (1 = isotropic) and effective rank of the embeddings of 128 unseen pictures."""
    made = model.processor_class(size=16).eval_processor()
    pixels = made(pictures(128, seed=99), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeddings = model.eval().features(pixels)
    return feature_std(embeddings) * embeddings.shape[1] ** 0.5, rankme(embeddings)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_simclr_spreads_its_embeddings(seed: int) -> None:
    model, logged = train("simclr", seed, RESNET)
    spread, rank = health(model)  # seen: 0.75–0.77 and 39–42; untrained: 0.30 and 18
    assert spread > 0.5 and rank > 28
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dino_neither_agrees_on_one_prototype_nor_on_all(seed: int) -> None:
    model, logged = train("dino", seed, RESNET, **DINO)
    spread, rank = health(model)  # seen: 0.78–0.79 and 47–48
    assert spread > 0.5 and rank > 28
    assert 1.0 < logged[-1]["teacher_entropy"] < 0.95 * math.log(64)  # seen: 3.5–3.7 of 4.16
    assert logged[-1]["prototype_entropy"] > 2.5  # seen: 3.6–3.7


def test_the_measures_catch_both_collapses_of_dino() -> None:
    _, logged = train("dino", 0, RESNET, **DINO, center_momentum=1.0)  # a centre that never moves
    assert logged[-1]["prototype_entropy"] < 0.5 < 1.0 < logged[0]["prototype_entropy"]
    hot = {**DINO, "teacher_temperature": 1.0, "warmup_teacher_temperature": 1.0}  # no sharpening
    _, logged = train("dino", 0, RESNET, **hot)
    assert logged[-1]["teacher_entropy"] > 0.995 * math.log(64)


CLUSTERS = {"projection_dim": 16, "hidden_dim": 64, "num_prototypes": 64, "temperature": 0.1}
CLUSTERING = {
    "swav": {**CLUSTERS, "queue_size": 0, "epsilon": 0.02, "freeze_prototypes": 0.05},
    "deepcluster_v2": {**CLUSTERS, "num_examples": 128, "kmeans_iterations": 10},
    "sela_v2": {**CLUSTERS, "num_examples": 128, "sinkhorn_iterations": 50, "freeze_prototypes": 0.05},
    "obow": {"vocabulary_size": 256, "teacher_momentum": 0.9},
}


@pytest.mark.parametrize("name", CLUSTERING)
def test_clusters_and_words_spread_the_embeddings(name: str) -> None:
    model, logged = train(name, 0, RESNET, 1e-3, **CLUSTERING[name])
    spread, rank = health(model)  # seen: 0.43–0.51 and 29–34; untrained: 0.30 and 18
    assert spread > 0.36 and rank > 24
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.2
    for entropy in {"prototype_entropy", "vocabulary_entropy"} & set(logged[-1]):  # seen: 4.16 of 64, 4.18 of 256
        assert logged[-1][entropy] > 3.5
