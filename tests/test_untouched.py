"""What runs beside the step leaves no trace: generators and models are as before, and the weights are the same."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_ssl import SSLTrainer, SSLTrainingArguments, evaluation, hub
from hf_ssl.data import load_source
from hf_ssl.data.labels import LabeledImages, draw_labeled
from hf_ssl.evaluation.report import write_report
from hf_ssl.training import precision
from hf_ssl.untouched import untouched
from tests.contract import tiny

DROPOUT = {
    **tiny.VIT,
    "hidden_dropout_prob": 0.1,
}  # the steps draw: numbers drawn elsewhere show in the weights


@pytest.fixture(scope="module")
def images():
    source = load_source("emoji")
    return dataclasses.replace(source, dataset=source.dataset.select(range(0, 3000, 60)).flatten_indices())


def state() -> tuple[Any, ...]:
    numbers = np.random.get_state()
    return random.getstate(), numbers[1].tolist(), numbers[2:], torch.get_rng_state().tolist()


def make_trainer(name: str, source: Any, folder: Path, **arguments: Any) -> SSLTrainer:
    labels: dict[str, Any] = {}
    backbone = {"mae": tiny.VIT, "dinov2": tiny.DINOV2}.get(name, DROPOUT)
    if name == "fixmatch":
        chosen, rows = draw_labeled(source, "group", per_class=2)
        backbone = {**backbone, "id2label": dict(enumerate(rows.names))}
        labels = {"labeled": LabeledImages(chosen, rows, 2)}
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "eval_images": 16,
    }  # fmt: skip
    args = SSLTrainingArguments(str(folder), **{**defaults, **arguments})
    source = dataclasses.replace(source, labels=("group",))
    return SSLTrainer(tiny.build(name, backbone), args, source, tiny.processor(name), source, source, **labels)


@pytest.mark.parametrize("name", ["mae", "dinov2", "fixmatch"])
def test_how_often_a_run_is_watched_does_not_change_its_weights(name, images, tmp_path):
    every = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "save_steps": 1, "health_steps": 1}
    never = {"eval_strategy": "no", "logging_strategy": "no", "save_strategy": "no", "health_steps": 0}
    watched, alone = (make_trainer(name, images, tmp_path, **how) for how in (every, never))
    watched.train(), alone.train()
    assert [entry for entry in watched.state.log_history if "eval_runtime" not in entry and "eval" in str(entry)]
    for key, value in alone.method.state_dict().items():
        assert torch.equal(value, watched.method.state_dict()[key]), key


def entry_points(source: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    """Everything that looks at a model while it may be training, on tiny models."""
    source = dataclasses.replace(source, labels=("group",))
    few = dataclasses.replace(source, dataset=source.dataset.select(range(16)))
    mae, clip, run = tiny.build("mae", DROPOUT), tiny.build("clip"), folder / "run"
    views, texts = tiny.processor("mae"), tiny.processor("clip")
    trainer = make_trainer("fixmatch", source, folder / "trainer", eval_strategy="steps", eval_steps=1)
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    classes = [i % 4 for i in range(40)]
    quiet = {"progress": False}
    facts = {"method": "mae", "dataset": "emoji", "seed": 0}

    def write_run() -> None:
        hub.export(mae, views, run, facts)
        (run / "run.json").write_text(json.dumps(facts))

    def save() -> None:
        trainer._save_checkpoint(trainer.model, None)

    def train() -> None:  # optimiser and scheduler are there afterwards; its own draws are undone
        with untouched():
            trainer.train()

    return {
        "train": train,
        "evaluate": trainer.evaluate,
        "log": lambda: trainer.log({"loss": 1.0}),
        "checkpoint": save,
        "model card": trainer.create_model_card,
        "precision": lambda: precision.choose(mae, tiny.batch("mae"), seconds=0.0),
        "precision sample": trainer._sample,
        "features": lambda: evaluation.extract_features(mae.backbone, few, views, **quiet),
        "features, workers": lambda: evaluation.extract_features(mae.backbone, few, views, num_workers=1, **quiet),
        "table": lambda: evaluation.evaluate_backbone(
            mae.backbone, views, few, few, measures=("knn", "linear", "retrieval", "health", "segmentation"), k=(3,),
            **quiet,
        ),
        "classification": lambda: evaluation.evaluate_backbone(
            trainer.method.ema, trainer.views, few, few, measures=("classification",), **quiet
        ),
        "image and text": lambda: evaluation.evaluate_backbone(
            clip.backbone, texts, few, few, measures=("zero_shot", "text_retrieval"), **quiet
        ),
        "pseudo-labels": lambda: evaluation.pseudo_label(trainer.method.ema, few, trainer.views, progress=False),
        "probe": lambda: evaluation.linear_probe(features, classes, features, classes),
        "probe, sgd": lambda: evaluation.linear_probe(features, classes, features, classes, solver="sgd"),
        "low shot": lambda: evaluation.low_shot(features, classes, features, classes),
        "health": lambda: evaluation.health_report(features, features),
        "untrained": lambda: evaluation.untrained(mae.backbone),
        "export": write_run,
        "parity": lambda: hub.check_parity(run, mae, views),
        "native": lambda: evaluation.load_native(str(run)),
        "backbone": lambda: evaluation.load_backbone(str(run)),
        "method": lambda: hub.load_method(run),
        "card": lambda: hub.model_card(mae, facts),
        "pictures": lambda: hub.draw_pictures(run, max_images=24),
        "report": lambda: write_report(run, max_images=24, progress=False),
    }  # fmt: skip


def test_no_entry_point_touches_the_generators_or_the_models(images, tmp_path):
    models = []
    build = tiny.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "build", lambda *a, **k: models.append(build(*a, **k)) or models[-1])
        points = entry_points(images, tmp_path)

    def seen() -> list[Any]:
        modules = [module for model in models for module in model.modules()]
        attention = [module.config._attn_implementation for module in modules if hasattr(module, "config")]
        dtypes = [tensor.dtype for model in models for tensor in model.state_dict().values()]
        return [[module.training for module in modules], attention, dtypes]

    for module in models[0].backbone.modules():
        module.training = False  # frozen on purpose: whatever restores "training mode" as a whole would wake it
    for name, call in points.items():
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        before, looks = state(), seen()
        call()
        assert state() == before, f"{name} draws from a global generator"
        assert name == "train" or seen() == looks, f"{name} leaves a model in another mode"
    assert (tmp_path / "run" / "pictures" / "filled_in.png").is_file() and (tmp_path / "run" / "report.html").is_file()


def test_untouched_restores_generators_modes_and_attention():
    model = tiny.build("simclr")
    model.projector.eval()
    before = state()
    try:
        with untouched(model):
            random.random(), np.random.rand(), torch.rand(1)
            model.train()
            model.backbone.set_attn_implementation("eager")
            raise KeyError
    except KeyError:
        pass
    assert state() == before and model.training and not model.projector.training
    assert model.backbone.config._attn_implementation == "sdpa"
