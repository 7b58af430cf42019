"""Training by a recipe within a budget of CPU time: what the quality benchmark and the leaderboard share."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_ssl import schedules
from hf_ssl.cli.pictures import Pictures
from hf_ssl.cli.plan import plan_training
from hf_ssl.cli.train import build_trainer
from hf_ssl.data import ImageSource, load_source


@dataclasses.dataclass
class Data:
    """Pictures to train on, which are also the bank, and pictures to measure on."""

    name: str
    train: ImageSource
    queries: ImageSource


class Budget(TrainerCallback):
    """Ends training when so many CPU seconds are spent; the number of steps is corrected as they pass."""

    def __init__(self, trainer: Any, seconds: float):
        self.trainer, self.seconds, self.spent, self._start = trainer, seconds, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        share = (time.process_time() - self._start) / self.seconds
        if state.global_step:
            state.max_steps = max(state.global_step + 1, round(state.global_step / share))
        self.trainer.method.total_steps.fill_(state.max_steps)
        warmup = args.get_warmup_steps(args.max_steps) / args.max_steps
        set_learning_rate(optimizer, share, args.learning_rate, warmup, args.min_learning_rate)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent = time.process_time() - self._start
        control.should_training_stop = self.spent >= self.seconds


def set_learning_rate(optimizer: Any, share: float, peak: float, warmup: float, end: float = 0.0) -> None:
    """The warm-up and half cosine of ``hf-ssl train`` at ``share`` of the budget."""
    for group in (group for group in optimizer.param_groups if not group.get("constant_rate")):
        group["lr"] = schedules.warmup_cosine(min(share, 1.0), group.get("initial_lr", peak), end, warmup)


def set_up(
    method: str, dataset: str, seed: int, recipe: Path, folder: str = "unused", flags: Sequence[str] = ()
) -> tuple[Data, Any]:
    """The data and an SSLTrainer of a recipe, with ``flags`` of ``hf-ssl train`` over it."""
    own = {
        "dataset": dataset, "output_dir": folder, "seed": seed, "max_steps": 10**6, "dataloader_num_workers": 0,
        "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": "true", "use_cpu": "true",
    }  # fmt: skip
    words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    data = Data(dataset, load_source(dataset), load_source(dataset, "test"))
    return data, build_trainer(plan_training([method, str(recipe), *words, *flags]), Pictures(data.train, []))
