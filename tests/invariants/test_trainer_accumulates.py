"""SSLTrainer itself: one batch of eight ≡ two accumulated batches of four, teacher, centre and step included."""

import io
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from hf_ssl.data.sources import ImageSource
from hf_ssl.training import SSLTrainer, SSLTrainingArguments
from tests.contract.tiny import build, pictures, processor


def source() -> ImageSource:
    rows = []
    for picture in pictures(32):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    return ImageSource(name="waves", dataset=Dataset.from_dict({"image": rows}), split="train")


def run(folder: Path, batch: int, accumulation: int) -> tuple[dict[str, Tensor], dict]:
    """Three optimiser steps of DINO with everything that follows the step on: EMA, centre, schedules, clipping."""
    model = build("dino", freeze_last_layer=0.4, teacher_momentum=0.5, warmup_teacher_temperature=0.05)
    args = SSLTrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=batch, learning_rate=1e-2, warmup_steps=0,
        gradient_accumulation_steps=accumulation, optim="sgd", weight_decay=0.04, weight_decay_end=0.4,
        clip_grad_per_tensor=0.3, max_grad_norm=0.0, logging_steps=3, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    trainer = SSLTrainer(model=model, args=args, train_source=source(), processing_class=processor("dino"))
    trainer.train()
    return {key: value.clone() for key, value in model.state_dict().items()}, trainer.state.log_history[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], dict]]:
    return [run(tmp_path_factory.mktemp("run"), batch, steps) for batch, steps in ((8, 1), (4, 2))]


def test_state_after_the_run_is_the_same(runs) -> None:
    (whole, _), (parts, _) = runs
    assert int(whole["step"]) == int(parts["step"]) == 3 == int(whole["total_steps"])
    start = build("dino").state_dict()
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    moved = {key for key, value in whole.items() if not torch.equal(value, start[key])}
    assert {
        "center.value",
        "head.mlp.0.weight",
        "teacher_head.mlp.0.weight",
        "teacher_backbone.layers.0.mlp.fc1.weight",
    } <= moved


def test_logged_loss_and_metrics_are_means_over_micro_batches(runs) -> None:
    (_, whole), (_, parts) = runs
    for key in ("loss", "teacher_entropy"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-4), key
