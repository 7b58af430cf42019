"""Losses, gradients and weights that are no numbers: the run stops, its last checkpoint stays, the step repeats."""

import dataclasses
import json
import math
import shutil
import types

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_ssl import export
from hf_ssl.data.variety import nothing_to_learn
from hf_ssl.finite import NonFiniteError, not_finite
from hf_ssl.training.nonfinite import READ_EVERY, NonFiniteCallback, StoppedAtNonFinite
from tests.contract import tiny

from .conftest import make_trainer

TOO_FAST = {"learning_rate": 1e9, "warmup_steps": 2, "save_steps": 100, "max_steps": 12, "health_steps": 0}


class SaveAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 1  # before anything moves: the first rate of a warm-up is 0


class Poison(TrainerCallback):
    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer.method.projector[0].weight.data[0, 0] = math.nan


def test_a_run_that_learns_too_fast_stops_keeps_its_checkpoint_and_repeats_the_step(tmp_path, pictures):
    trainer = make_trainer(pictures, tmp_path, **TOO_FAST)
    trainer.add_callback(SaveAt())
    with pytest.raises(StoppedAtNonFinite, match="NaN or infinite in 3 steps in a row") as stopped:
        trainer.train()
    error = stopped.value
    assert trainer.state.global_step == error.step + 2 and "checkpoint-1 is finite and kept" in str(error)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    shutil.rmtree(tmp_path / "checkpoint-1")  # as rotation would, in a later run
    told = json.loads((tmp_path / "nonfinite" / "step.json").read_text())
    assert told["step"] == error.step and told["seed"] == 42 and told["checkpoint"] == "checkpoint-1"

    again = make_trainer(pictures, tmp_path / "elsewhere", **TOO_FAST)
    found = again.replay(tmp_path / "nonfinite")
    assert found["reproduced"] and found["step"] <= error.step and (found["weights"] or found["module"])
    assert not all(map(math.isfinite, found["values"])) or found["weights"]
    batches = iter(again._build_loader(16, rank=0, world_size=1, num_workers=0, shuffle_buffer=1))
    rows = [next(batches).row_numbers() for _ in range(error.step)]
    assert told["micro_batches"] == [[rows[error.step - 1]]] and found["rows"] == [rows[found["step"] - 1]]
    assert len(set(rows[0]["rows"])) == 16
    assert not list((tmp_path / "elsewhere").glob("checkpoint-*"))


def test_weights_that_are_no_numbers_never_replace_finite_ones(tmp_path, pictures):
    trainer = make_trainer(pictures, tmp_path, save_steps=1, save_total_limit=2, max_steps=8)
    trainer.add_callback(Poison(trainer, 4))
    with pytest.raises(StoppedAtNonFinite, match=r"more tensors are NaN.*since step 5"):
        trainer.train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]
    for name in kept:
        assert all(value.isfinite().all() for value in load_file(tmp_path / name / "model.safetensors").values())
    assert (tmp_path / "nonfinite" / "checkpoint-4" / "model.safetensors").stat().st_nlink == 2  # no second copy


def test_the_end_of_a_run_is_looked_at_too(tmp_path, pictures):
    trainer = make_trainer(pictures, tmp_path, save_strategy="no", max_steps=3)
    trainer.add_callback(Poison(trainer, 2))  # one bad step: too few to stop, and nothing is saved
    with pytest.raises(StoppedAtNonFinite, match="at the end"):
        trainer.train()


def watch(steps=3, device="cpu"):
    """A callback alone, and how a step ends for it: (loss, gradient norm, whether the scaler skipped it)."""
    args = types.SimpleNamespace(nonfinite_steps=steps, device=torch.device(device), world_size=1)
    trainer = types.SimpleNamespace(args=args)
    callback, step = NonFiniteCallback(trainer), [0]
    control = types.SimpleNamespace(should_log=False, should_save=False)

    def end(loss, norm=1.0, skipped=False):
        step[0] += 1
        callback.note_loss(torch.tensor(loss))
        callback.grad_norm = torch.tensor(norm)
        optimizer = types.SimpleNamespace(step_was_skipped=skipped)
        callback.on_step_end(args, types.SimpleNamespace(global_step=step[0]), control, optimizer)

    return callback, end


def test_three_in_a_row_stop_a_run_and_two_do_not(monkeypatch):
    stops = []
    monkeypatch.setattr(NonFiniteCallback, "_stop", lambda self, words: stops.append(self._first))
    for values, first in (
        ([math.nan, math.inf, 1.0, math.nan, math.nan, 1.0], None),
        ([1.0, math.nan, -math.inf, math.nan], 2),
    ):
        _, end = watch()
        stops.clear()
        for value in values:
            end(value)
        assert stops == ([] if first is None else [first])
        stops.clear()
        _, end = watch()
        for value in values:
            end(1.0, norm=abs(value))
        assert stops == ([] if first is None else [first])


def test_steps_that_the_loss_scaler_skips_are_normal(monkeypatch):
    stops = []
    monkeypatch.setattr(NonFiniteCallback, "_stop", lambda self, words: stops.append(self._first))
    _, end = watch()
    for _ in range(9):
        end(1.0, norm=math.inf, skipped=True)
    assert not stops
    for _ in range(3):
        end(math.nan, norm=math.nan, skipped=True)  # a loss that is no number is never the scaler's doing
    assert stops == [10]


def test_a_device_is_waited_for_every_few_steps_only(monkeypatch):
    reads = []
    monkeypatch.setattr(NonFiniteCallback, "read", lambda self: reads.append(len(self._pending)))
    _, end = watch(device="meta")  # stands for any device that is no CPU
    for _ in range(2 * READ_EVERY):
        end(1.0)
    assert len(reads) == 2


def test_a_model_that_is_no_number_is_not_exported(tmp_path):
    model = tiny.build("simclr")
    assert not_finite(model) == []
    model.projector[0].weight.data[0, 0] = math.inf
    model.backbone.embeddings.cls_token.data.fill_(3e38)  # large, and a sum of it infinite, yet a number
    assert not_finite(model) == ["projector.0.weight"]
    with pytest.raises(NonFiniteError, match=r"projector\.0\.weight is not finite"):
        export(model, tiny.processor("simclr"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pictures_that_are_all_alike_are_told(tmp_path, pictures, caplog):
    assert nothing_to_learn(pictures) is None
    same = dataclasses.replace(pictures, dataset=pictures.dataset.select([5] * 40))
    assert "are the same" in nothing_to_learn(same)
    blank = dataclasses.replace(pictures, render=None, dataset=pictures.dataset.select(range(40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(blank), "decode", lambda self, row: torch.full((4, 4, 3), row["_index"]).numpy())
        assert "of one colour" in nothing_to_learn(blank)
    with caplog.at_level("WARNING"):
        make_trainer(same, tmp_path, max_steps=1, save_strategy="no").train()
    assert "are the same" in caplog.text
