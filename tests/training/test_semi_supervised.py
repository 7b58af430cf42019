"""FixMatch in the trainer: exact resume with both streams, one labelled subset, selection on validation only."""

import dataclasses
import json
import math
import signal

import pytest
import torch
from transformers import ResNetConfig

from hf_ssl import FixMatchConfig, FixMatchForPreTraining, FixMatchImageProcessor, SSLTrainer, SSLTrainingArguments
from hf_ssl.data import load_source
from hf_ssl.data.labels import LabeledImages, draw_labeled
from hf_ssl.finite import NonFiniteError
from tests.invariants.ranks import run_on_ranks

from .conftest import BACKBONE, in_child
from .test_resume import KillAt, final_state


def make_fixmatch(
    source, folder, unlabeled=None, draw=0, column="subgroup", eval_queries=None, **arguments
) -> SSLTrainer:
    torch.manual_seed(0)
    labeled, rows = draw_labeled(source, column, fraction=0.25, seed=draw)
    backbone = ResNetConfig(**BACKBONE, id2label=dict(enumerate(rows.names)))
    config = FixMatchConfig(backbone_config=backbone, threshold=0.2, ema_momentum=0.9)
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 0.05, "save_steps": 2, "logging_steps": 3,
        "optim": "sgd_nesterov", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return SSLTrainer(
        FixMatchForPreTraining(config), SSLTrainingArguments(str(folder), **{**defaults, **arguments}),
        unlabeled or source, FixMatchImageProcessor(size=16), eval_bank=eval_queries and source,
        eval_queries=eval_queries, labeled=LabeledImages(labeled, rows, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "workers", "step"), [("map", 0, 3), ("map", 2, 9), ("stream", 0, 10), ("stream", 2, 5)]
)
def test_killed_and_resumed_is_bit_equal_with_both_streams_shuffled(tmp_path, pictures, shards, kind, workers, step):
    """12 steps of 12 of 96 unlabelled images: one and a half passes; the 24 labelled ones come round twice."""
    unlabeled = load_source(shards, streaming=True) if kind == "stream" else pictures
    whole = make_fixmatch(pictures, tmp_path / "whole", unlabeled, dataloader_num_workers=workers)
    whole.train()

    def killed():
        trainer = make_fixmatch(pictures, tmp_path / "killed", unlabeled, dataloader_num_workers=workers)
        trainer.add_callback(KillAt(step))
        trainer.train()

    assert in_child(killed) == -signal.SIGKILL
    resumed = make_fixmatch(pictures, tmp_path / "killed", unlabeled, dataloader_num_workers=workers)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    for name, value in final_state(whole).items():
        assert torch.equal(value, resumed.method.state_dict()[name]), name


def test_the_labelled_rows_are_in_the_checkpoint_and_another_subset_is_refused(tmp_path, pictures):
    trainer = make_fixmatch(pictures, tmp_path, max_steps=2)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "labeled_rows.json").read_text())
    assert saved["rows"] == list(trainer.labeled.rows.rows) and saved["seed"] == 0 and len(saved["rows"]) == 24
    with pytest.raises(ValueError, match="labelled rows differ"):
        make_fixmatch(pictures, tmp_path, draw=1).train(resume_from_checkpoint=True)


def own_draw(name: str) -> list[str]:
    """On a rank: a run whose labelled subset depends on the rank ("ranks") or not ("seed"); NaN on one ("nan")."""
    import tempfile

    source = load_source("emoji")
    source = dataclasses.replace(source, dataset=source.dataset.select(range(96)))
    draw = torch.distributed.get_rank() if name == "ranks" else 0
    with tempfile.TemporaryDirectory() as folder:
        steps = 12 if name == "nan" else 1
        trainer = make_fixmatch(source, folder, draw=draw, max_steps=steps, save_strategy="no", logging_steps=100)
        if name == "nan" and torch.distributed.get_rank() == 1:
            noted = trainer.nonfinite.note_loss
            trainer.nonfinite.note_loss = lambda loss: noted(loss * math.nan)
        try:
            trainer.train()
        except (ValueError, NonFiniteError) as error:
            return [str(error)]
    return ["trained"]


def test_ranks_with_different_labels_are_refused(tmp_path):
    """Trap: a subset per rank leaks labels, world size times as many, and raises the accuracy without a word."""
    found = run_on_ranks(own_draw, ["seed", "ranks", "nan"], tmp_path)
    assert found["seed"] == [["trained"]] * 2
    assert all("labelled rows differ" in words for [words] in found["ranks"])
    assert all("in 3 steps in a row, from step 1" in words for [words] in found["nan"])  # all stop with the one


def test_the_best_checkpoint_is_not_chosen_on_test_images(tmp_path, pictures):
    test = load_source("emoji", "test")
    select = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    with pytest.raises(ValueError, match="validation"):
        make_fixmatch(pictures, tmp_path, eval_queries=test, **select)
    held = dataclasses.replace(pictures, split="train (held out)", labels=("subgroup",))
    select |= {"metric_for_best_model": "accuracy", "max_steps": 4}
    trainer = make_fixmatch(pictures, tmp_path, eval_queries=held, **select)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None


def test_what_is_logged(tmp_path, pictures):
    trainer = make_fixmatch(pictures, tmp_path, max_steps=3, eval_queries=pictures)
    seen = []
    trainer.add_callback(Watch(trainer, seen))
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    histogram = torch.tensor(logged["pseudo_label_histogram"])
    assert histogram.shape == (len(trainer.labeled.rows.names),)
    assert float(histogram.sum()) == pytest.approx(logged["utilisation"], abs=1e-6) and logged["utilisation"] > 0
    kept, right = (sum(float(metrics[key]) for metrics in seen) for key in ("kept_known", "kept_correct"))
    assert logged["pseudo_label_accuracy"] == pytest.approx(right / kept)  # a ratio of sums, no mean of ratios
    assert not {"kept_known", "kept_correct"} & set(logged)
    measured = trainer.evaluate()
    assert {"eval_accuracy", "eval_student_accuracy", "eval_macro_f1", "eval_ece"} <= set(measured)


class Watch(KillAt):
    def __init__(self, trainer, seen):
        self.trainer, self.seen = trainer, seen

    def on_step_begin(self, args, state, control, **kwargs):
        pass

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.trainer.last_metrics)


def test_the_published_optimiser_and_schedule(tmp_path, pictures):
    """SGD with Nesterov momentum .9; the rate at step k of K is lr · cos(7πk / 16K)."""
    trainer = make_fixmatch(pictures, tmp_path, lr_scheduler_type="cosine_7_16", learning_rate=0.03, max_steps=8)
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(8)
    assert type(optimizer).__name__ == "SGD"
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)
    rates = []
    for _ in range(9):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.03 * math.cos(7 * math.pi * k / 128) for k in range(9)])
