"""The trainer around the step: groups, scaling, averaging, clean stops."""

import dataclasses
import logging
import os
import resource
import signal
import threading
import time

import pytest
import torch
from datasets import Dataset, Image
from transformers import AutoModel, TrainerCallback

from hf_ssl import DINOConfig, DINOForPreTraining
from hf_ssl.data.collator import TooManyBadImages
from hf_ssl.finite import NonFiniteError
from hf_ssl.training.optim import clip_per_tensor, decay_names, scaled_learning_rate
from hf_ssl.training.trainer import CheckpointError, last_complete_checkpoint

from .conftest import in_child, make_trainer

VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def test_decay_spares_norms_biases_tokens_positions_and_gains():
    model = DINOForPreTraining(DINOConfig(backbone_config=VIT, out_dim=8, hidden_dim=8, bottleneck_dim=4)).train()
    names = decay_names(model)
    assert "head.mlp.0.weight" in names and "head.last_layer.weight_v" in names
    spared = ("cls_token", "position_embeddings", "weight_g", "bias", "layernorm", "teacher")
    assert not [name for name in names if any(word in name for word in spared)]
    assert "backbone.embeddings.cls_token" in decay_names(model, tokens=True)


def test_optimizer_groups_hold_every_trainable_parameter_once(tmp_path, pictures):
    trainer = make_trainer(pictures, tmp_path, optim="lars", weight_decay=1e-4)
    groups = trainer.create_optimizer().param_groups
    assert [(group["decayed"], group["weight_decay"], group["always_adapt"]) for group in groups] == [
        (True, 1e-4, True), (False, 0.0, False),
    ]  # fmt: skip
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.model.parameters() if p.requires_grad)
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])


@pytest.mark.parametrize(
    ("rule", "expected"), [(("linear", 256), 0.6), (("sqrt", 256), 0.3 * 2**0.5), (("none", 1), 0.3)]
)
def test_learning_rate_scaling(rule, expected):
    assert scaled_learning_rate(0.3, rule, 512) == pytest.approx(expected)


def test_base_learning_rate_counts_accumulation(tmp_path, pictures):
    trainer = make_trainer(pictures, tmp_path, base_learning_rate=0.3, gradient_accumulation_steps=2)
    assert trainer.args.learning_rate == pytest.approx(0.3 * 32 / 256)


def test_clip_per_tensor_scales_each_gradient_alone():
    small, large = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    small.grad, large.grad = torch.tensor([0.3, 0.4]), torch.tensor([6.0, 8.0])
    norms = clip_per_tensor([small, large], 5.0)
    torch.testing.assert_close(norms, torch.tensor([0.5, 10.0]))
    torch.testing.assert_close(small.grad, torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(large.grad, torch.tensor([3.0, 4.0]))


def test_metrics_are_averaged_over_the_logging_window(tmp_path, pictures):
    trainer = make_trainer(pictures, tmp_path, max_steps=3, health_steps=0)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(float(trainer.last_metrics["contrastive_accuracy"]))

    trainer.add_callback(Watch())
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["contrastive_accuracy"] == pytest.approx(sum(seen) / 3)


def test_state_moves_once_per_optimiser_step_whatever_the_accumulation(tmp_path, pictures):
    trainer = make_trainer(pictures, tmp_path, max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.method.step.item() == 3 and trainer.method.total_steps.item() == 3


def test_a_run_counted_in_epochs_knows_all_its_steps(tmp_path, pictures):
    """solo-learn cf70ac0 took an epoch's steps for the run's: every schedule had ended after the first epoch."""
    trainer = make_trainer(pictures, tmp_path, num_train_epochs=2, save_strategy="no")
    trainer.train()
    assert trainer.method.total_steps.item() == 2 * 6 == trainer.method.step.item()


def test_weight_decay_follows_its_cosine(tmp_path, pictures):
    trainer = make_trainer(pictures, tmp_path, max_steps=4, weight_decay=0.04, weight_decay_end=0.4)
    decays = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            decays.append([group["weight_decay"] for group in optimizer.param_groups])

    trainer.add_callback(Watch())
    trainer.train()
    expected = [0.04, 0.0927207794, 0.22, 0.3472792206]  # 0.4 − 0.18·(1 + cos(π·i/4)), by hand
    assert [row[0] for row in decays] == pytest.approx(expected)
    assert {row[1] for row in decays} == {0.0}


def broken_rows(pictures, broken: int):
    """The pictures with the first ``broken`` files cut short."""
    rows = pictures.dataset.to_list()
    for row in rows[:broken]:
        row["image"] = {"bytes": row["image"]["bytes"][:60], "path": f"broken-{row['code_point']}.png"}
    dataset = Dataset.from_list(rows).cast_column("image", Image(decode=False))
    return dataclasses.replace(pictures, dataset=dataset)


def test_too_many_broken_images_stop_the_run_with_a_checkpoint(tmp_path, pictures):
    trainer = make_trainer(broken_rows(pictures, 5), tmp_path, save_steps=100)
    with pytest.raises(TooManyBadImages, match="max_bad_fraction"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) is not None


def test_a_few_broken_images_are_named_and_passed_over(tmp_path, pictures, caplog):
    trainer = make_trainer(broken_rows(pictures, 2), tmp_path, max_bad_fraction=0.05)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    skipped = trainer.skipped_images()
    assert skipped["count"] == 2 and all("broken-" in name for name in skipped["names"])
    assert trainer.state.global_step == 12
    assert all(name in caplog.text for name in skipped["names"])


class SignalAt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


class SignalWhileWaiting(TrainerCallback):
    """The workers hang while there is a file; SIGTERM comes half a second after it was made."""

    def __init__(self, hang):
        self.hang = hang

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.hang.touch()
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()


def test_sigterm_ends_a_run_whose_workers_hang(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("hf_ssl.data.workers._PATIENCE", 1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # how long torch waits for their end
    hang = tmp_path / "hang"

    def render(picture, rng):
        while hang.exists():
            time.sleep(0.1)
        return picture[:, :, :3]

    source = dataclasses.replace(pictures, render=render)
    trainer = make_trainer(source, tmp_path / "run", save_steps=100, dataloader_num_workers=1)
    trainer.add_callback(SignalWhileWaiting(hang))
    trainer.train()
    step = trainer.state.global_step
    assert trainer.terminated and 2 <= step < 12
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / f"checkpoint-{step}")


def test_sigterm_saves_and_ends_cleanly(tmp_path, pictures):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(pictures, tmp_path, save_steps=100)
    trainer.add_callback(SignalAt())
    trainer.train()
    assert trainer.terminated and trainer.state.global_step == 4
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(tmp_path, pictures):
    def child():
        trainer = make_trainer(pictures, tmp_path, max_steps=6)

        class Fill(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 3:  # no file may grow past 20 kB from here on
                    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

        trainer.add_callback(Fill())
        try:
            trainer.train()
        except CheckpointError as error:
            os._exit(42 if "checkpoint-2" in str(error) and "checkpoint-4" in str(error) else 1)
        os._exit(0)

    assert in_child(child) == 42
    assert not (tmp_path / "checkpoint-4").exists()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    AutoModel.from_pretrained(tmp_path / "checkpoint-2")


def test_an_unwritable_folder_is_told(tmp_path, pictures):
    trainer = make_trainer(pictures, tmp_path, max_steps=2)
    (tmp_path / "checkpoint-2").write_text("a file where the folder should go")
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        trainer.train()


def test_collapse_is_said_in_words_once(tmp_path, pictures, caplog):
    trainer = make_trainer(pictures, tmp_path, max_steps=12, health_steps=2, learning_rate=1e-9)

    class Collapse(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:  # every channel of the last layer answers the same for every image
                for module in trainer.method.backbone.modules():
                    if isinstance(module, torch.nn.BatchNorm2d):
                        torch.nn.init.zeros_(module.weight)
                        torch.nn.init.ones_(module.bias)

    trainer.add_callback(Collapse())
    with caplog.at_level(logging.WARNING, logger="hf_ssl.training"):
        trainer.train()
    spread = [record for record in caplog.records if "nearly the same feature" in record.getMessage()]
    assert len(spread) == 1
    assert trainer.state.log_history[-2]["feature_std"] < 0.01


def test_a_loss_that_is_no_number_is_said_in_words(tmp_path, pictures, caplog):
    trainer = make_trainer(pictures, tmp_path, max_steps=4, health_steps=2)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.method.projector[0].weight.data.fill_(float("nan"))

    trainer.add_callback(Poison())
    with caplog.at_level(logging.WARNING, logger="hf_ssl.training"), pytest.raises(NonFiniteError):
        trainer.train()
    assert "NaN or infinite" in caplog.text
