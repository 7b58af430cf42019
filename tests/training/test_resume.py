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


def test_a_half_written_checkpoint_is_passed_over(tmp_path, pictures):
    trainer = make_trainer(pictures, tmp_path, max_steps=4)
    trainer.train()
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text('{"global_st')
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_resume_without_a_checkpoint_says_so(tmp_path, pictures):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer(pictures, tmp_path).train(resume_from_checkpoint=True)


def test_checkpoints_rotate_and_hold_no_pickle(tmp_path, pictures):
    make_trainer(pictures, tmp_path, max_steps=6, save_total_limit=2, hub_token="hf_secret").train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not list(tmp_path.rglob("training_args.bin"))
    assert "hf_secret" not in (tmp_path / "checkpoint-6" / "training_args.json").read_text()
