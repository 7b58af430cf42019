"""Training by a recipe within a budget of CPU time: what the quality benchmark and the leaderboard share."""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from hf_ssl import schedules
from hf_ssl.cli.pictures import Pictures
from hf_ssl.cli.plan import Plan, plan_training
from hf_ssl.cli.train import build_trainer
from hf_ssl.data import ImageSource, load_source

NOWHERE = str(Path(tempfile.gettempdir(), "hf_ssl_benchmark"))  # the output folder of runs that save nothing
HELD_OUT = 6  # one in so many training images, and every drawing of an emoji with it


@dataclasses.dataclass
class Data:
    """Pictures to train on, which are also the bank, and pictures to measure on."""

    name: str
    train: ImageSource
    queries: ImageSource

    @classmethod
    def load(cls, name: str, final: bool = True, images: int | None = None) -> "Data":
        """final: measure on the test images, else on a sixth of the training images, which is then not trained on.
        images: train on so many at most, a fixed random draw."""
        train = load_source(name)
        draw = np.random.default_rng(0)
        if final:
            queries, rows = load_source(name, "test"), np.arange(len(train))
        else:
            unit = np.asarray(train.dataset["code_point"]) if name.startswith("emoji") else np.arange(len(train))
            units = np.unique(unit)
            held = np.isin(unit, draw.permutation(units)[: len(units) // HELD_OUT])
            queries, rows = _rows_of(train, np.flatnonzero(held)), np.flatnonzero(~held)
        if images is not None and images < len(rows):
            rows = np.sort(draw.permutation(rows)[:images])
        return cls(name, train if len(rows) == len(train) else _rows_of(train, rows), queries)


def _rows_of(source: ImageSource, rows: np.ndarray) -> ImageSource:
    assert not source.is_stream
    return dataclasses.replace(source, dataset=source.dataset.select(rows).flatten_indices())


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
    method: str, data: Data, seed: int, recipe: Path, folder: str = NOWHERE, flags: Sequence[str] = ()
) -> tuple[Plan, Any]:
    """The plan and an SSLTrainer of a recipe, with ``flags`` of ``hf-ssl train`` over it."""
    own = {
        "dataset": data.name, "output_dir": folder, "seed": seed, "max_steps": 10**6, "dataloader_num_workers": 0,
        "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": "true", "use_cpu": "true",
    }  # fmt: skip
    words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    plan = plan_training([method, str(recipe), *words, *flags])
    return plan, build_trainer(plan, Pictures(data.train, []))
