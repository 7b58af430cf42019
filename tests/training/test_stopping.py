"""When a run saves, and how it ends before its end."""

import json
import multiprocessing
import os
import signal
import socket

import pytest
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from hf_ssl import SSLTrainingArguments
from hf_ssl.cli import main
from hf_ssl.training.callbacks import MethodCallback
from hf_ssl.training.checkpoints import checkpoints, last_complete_checkpoint
from hf_ssl.training.lock import NAME, RunLocked, lock

from .conftest import in_child, make_trainer


class SignalAt(TrainerCallback):
    """Sends this process a signal at the begin of these steps."""

    def __init__(self, number: int, *steps: int):
        self.number, self.steps = number, steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            os.kill(os.getpid(), self.number)


def steps(folder) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in checkpoints(folder)]


def test_ctrl_c_saves_and_interrupts(tmp_path, pictures, capfd):
    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(pictures, tmp_path, save_steps=100)
    trainer.add_callback(SignalAt(signal.SIGINT, 3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 4 and not trainer.terminated
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert signal.getsignal(signal.SIGINT) is before and not (tmp_path / NAME).exists()
    assert "Ctrl-C again quits at once" in capfd.readouterr().err


def test_a_second_ctrl_c_quits_at_once(tmp_path, pictures):
    class Twice(SignalAt):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control)
            super().on_step_begin(args, state, control)

    trainer = make_trainer(pictures, tmp_path, save_steps=100)
    trainer.add_callback(Twice(signal.SIGINT, 3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 3 and steps(tmp_path) == []


def test_the_clock_says_when_to_save_where_nobody_said_how_often(tmp_path, pictures):
    def saved(name, **arguments):
        make_trainer(pictures, tmp_path / name, max_steps=3, **arguments).train()
        return steps(tmp_path / name)

    assert saved("default", save_steps=None) == [3]  # five minutes have not passed
    assert saved("often", save_steps=None, save_minutes=1e-9) == [1, 2, 3]
    assert saved("counted", save_steps=2, save_minutes=1e-9) == [2, 3]
    assert saved("never", save_steps=None, save_minutes=1e-9, save_strategy="no") == []
    assert saved("epochs", save_steps=None, save_minutes=1e-9, save_strategy="epoch") == [3]
    best = SSLTrainingArguments(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", eval_steps=4, use_cpu=True
    )
    assert best.save_steps == 4  # the best checkpoint must be there


def test_a_second_run_into_the_folder_is_refused(tmp_path, pictures):
    refused = []

    class Intrude(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                refused.append(in_child(intrude))

    def intrude():
        try:
            make_trainer(pictures, tmp_path).train()
        except RunLocked as error:
            os._exit(42 if f"process {os.getppid()} on this machine" in str(error) else 1)

    trainer = make_trainer(pictures, tmp_path, max_steps=2)
    trainer.add_callback(Intrude())
    trainer.train()
    assert refused == [42] and not (tmp_path / NAME).exists()
    trainer.train()  # the same process again


def test_a_lock_is_judged_by_who_left_it(tmp_path, caplog):
    def killed():
        with lock(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    left = json.loads((tmp_path / NAME).read_text())
    with lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        with lock(tmp_path):  # the command and the trainer both ask
            pass
        assert (tmp_path / NAME).exists()
    assert "has ended without removing its lock" in caplog.text

    (tmp_path / NAME).write_text(json.dumps({**left, "pid": os.getpid()}))  # its number, given out again
    with lock(tmp_path):
        pass
    for text in ('{"pid": 1', json.dumps({**left, "pid": [1]}), json.dumps({**left, "host": None})):
        (tmp_path / NAME).write_text(text)
        with lock(tmp_path):
            pass
    assert "is damaged" in caplog.text
    (tmp_path / NAME).write_text(json.dumps({**left, "host": "elsewhere"}))
    with pytest.raises(RunLocked, match=rf"another machine \(elsewhere.*remove {tmp_path / NAME} if"), lock(tmp_path):
        pass
    assert (tmp_path / NAME).exists()
    with pytest.raises(ZeroDivisionError), lock(tmp_path / "gone"):  # nothing can be written there
        1 / 0  # noqa: B018


def on_two_ranks(folder, number: int, at: int, length: int) -> list[int]:
    """The exit codes of a run of the command line on two gloo processes, of which the second gets a signal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = [
        "--dataset", "emoji", "--output_dir", str(folder), "--backbone", "resnet-nano", "--image_size", "16",
        "--per_device_train_batch_size", "8", "--projection_dim", "8", "--max_steps", str(length), "--use_cpu",
        "--no_evaluation", "--no_report", "--report_to", "none", "--eval_strategy", "no", "--disable_tqdm", "true",
    ]  # fmt: skip

    def rank(index: int):
        def child():
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(index))
            os.environ["LOCAL_RANK"] = str(index)
            AcceleratorState._reset_state(reset_partial_state=True)  # what this process inherited has one rank
            begin = MethodCallback.on_step_begin

            def on_step_begin(self, args, state, control, **kwargs):
                if index == 1 and state.global_step == at:
                    os.kill(os.getpid(), number)
                begin(self, args, state, control, **kwargs)

            MethodCallback.on_step_begin = on_step_begin
            os._exit(main(["train", "simclr", *arguments]))

        return child

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank(index)) for index in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    return [process.exitcode for process in processes]


def test_a_signal_at_one_rank_reaches_all(tmp_path, capfd):
    """Before an agreement of the ranks, and after the last one; and the signal that no process survives."""
    assert on_two_ranks(tmp_path / "middle", signal.SIGTERM, at=0, length=50) == [143, 143]
    assert steps(tmp_path / "middle") == [1]
    assert on_two_ranks(tmp_path / "end", signal.SIGTERM, at=2, length=3) == [143, 143]
    assert steps(tmp_path / "end") == [3] and not (tmp_path / "end" / "ssl").exists()
    assert on_two_ranks(tmp_path / "killed", signal.SIGKILL, at=2, length=50) == [1, -signal.SIGKILL]
    said = capfd.readouterr().err
    assert "another process of this run has ended" in said and "Traceback" not in said
    assert "begins again" in said.strip().splitlines()[-1]
