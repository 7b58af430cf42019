"""A run that is killed and resumed ends with the weights of the run that was not, bit for bit."""

import os
import signal

import pytest
import torch
from transformers import TrainerCallback

from hf_ssl.data import load_source
from hf_ssl.training.trainer import last_complete_checkpoint

from .conftest import in_child, make_trainer


class KillAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def final_state(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.method.state_dict().items()}


CASES = [("map", 0, 3), ("map", 2, 6), ("stream", 0, 9), ("stream", 2, 5)]


@pytest.mark.parametrize(("kind", "workers", "step"), CASES)
def test_killed_and_resumed_is_bit_equal(tmp_path, pictures, shards, kind, workers, step):
    source = pictures if kind == "map" else load_source(shards, streaming=True)
    arguments = {"dataloader_num_workers": workers}
    whole = make_trainer(source, tmp_path / "whole", **arguments)
    whole.train()
    assert whole.state.global_step == 12

    def killed():
        trainer = make_trainer(source, tmp_path / "killed", **arguments)
        trainer.add_callback(KillAt(step))
        trainer.train()

    assert in_child(killed) == -signal.SIGKILL
    resumed = make_trainer(source, tmp_path / "killed", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert resumed.state.epoch == 2
    for name, value in final_state(whole).items():
        assert torch.equal(value, resumed.method.state_dict()[name]), name
    assert whole.state.log_history[-2]["loss"] == resumed.state.log_history[-2]["loss"]


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"max_steps": 4}, 4),  # in the middle of an epoch of six
        ({"num_train_epochs": 1}, 6),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 4}, 2),
        ({"max_steps": 2, "gradient_accumulation_steps": 2, "streaming": True}, 2),
    ],
)
def test_a_run_that_is_whole_trains_nothing_more(tmp_path, pictures, shards, caplog, arguments, steps):
    source = load_source(shards, streaming=True) if arguments.pop("streaming", False) else pictures
    whole = make_trainer(source, tmp_path, **arguments)
    whole.train()
    logged = len(whole.state.log_history) - 1  # the end's own entry is not in the checkpoint
    for _ in range(2):
        resumed = make_trainer(source, tmp_path, **arguments)
        with caplog.at_level("WARNING", logger="hf_ssl.training"):
            resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == steps == whole.state.global_step
        assert len(resumed.state.log_history) == logged
        assert f"Nothing is left to train: checkpoint-{steps} stands at the last of {steps} steps." in caplog.text
        for name, value in final_state(whole).items():
            assert torch.equal(value, resumed.method.state_dict()[name]), name
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{steps}")


def test_a_longer_run_goes_on_by_its_own_schedule_and_a_shorter_one_is_refused(tmp_path, pictures, caplog):
    make_trainer(pictures, tmp_path, max_steps=4).train()
    longer = make_trainer(pictures, tmp_path, max_steps=8, logging_steps=1)
    with caplog.at_level("WARNING", logger="hf_ssl.training"):
        longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 8
    assert "The run has 8 steps, and 4 when checkpoint-4 was written: learning rate" in caplog.text
    rates = [entry["learning_rate"] for entry in longer.state.log_history if entry["step"] == 5]
    assert rates[0] == pytest.approx(0.05 * 0.5)  # half-way down the new cosine, where the old one had ended at 0
    with pytest.raises(ValueError, match=r"stands at step 8 and the run has 5 steps: raise --max_steps"):
        make_trainer(pictures, tmp_path, max_steps=5).train(resume_from_checkpoint=True)


def test_checkpoints_rotate_and_hold_no_pickle(tmp_path, pictures):
    make_trainer(pictures, tmp_path, max_steps=6, save_total_limit=2, hub_token="hf_secret").train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not list(tmp_path.rglob("training_args.bin"))
    assert "hf_secret" not in (tmp_path / "checkpoint-6" / "training_args.json").read_text()
