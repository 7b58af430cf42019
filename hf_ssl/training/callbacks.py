"""What happens around an optimiser step: the method's own hooks, collapse warnings, a clean stop."""

import logging
import signal
import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from .. import distributed, schedules
from ..data.collator import TooManyBadImages
from ..evaluation import health
from .optim import clip_per_module, clip_per_tensor

if TYPE_CHECKING:
    from .trainer import SSLTrainer

logger = logging.getLogger("hf_ssl.training")

_AGREE_EVERY = 10  # steps between the ranks' agreement on an early stop: a sync, so not at every step


class MethodCallback(TrainerCallback):
    """Schedules and gradient hooks before, EMA, centres and the step counter after: once per optimiser step."""

    def __init__(self, trainer: "SSLTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.method.total_steps.fill_(state.max_steps)
        if state.global_step == 0:  # masks and dropout differ between ranks; a resumed run restores its own states
            torch.manual_seed(args.seed + args.process_index)

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if args.weight_decay_end is None:
            return
        decay = schedules.cosine(state.global_step / state.max_steps, args.weight_decay, args.weight_decay_end)
        for group in optimizer.param_groups:
            if group["decayed"]:
                group["weight_decay"] = decay

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.clip_grad_per_tensor > 0:
            clip_per_tensor(self.trainer.method.parameters(), args.clip_grad_per_tensor)
        if args.clip_grad_per_module > 0:
            clip_per_module(self.trainer.method, args.clip_grad_per_module)
        self.trainer.method.before_optimizer_step(state.global_step / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if getattr(optimizer, "step_was_skipped", False):  # fp16 overflow: there was no step to follow
            return
        self.trainer.method.after_optimizer_step((state.global_step - 1) / state.max_steps)


class HealthCallback(TrainerCallback):
    """Spread and effective rank of the last batch's embeddings, teacher entropy; warns in words, once per sign."""

    def __init__(self, trainer: "SSLTrainer"):
        self.trainer = trainer
        self.start: dict[str, float] | None = None
        self.said: set[str] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        embeddings = self.trainer.last_embeddings
        due = args.health_steps and (state.global_step == 1 or state.global_step % args.health_steps == 0)
        if not due or embeddings is None or len(embeddings) < 2:
            return
        report: dict[str, float] = {}
        if bool(embeddings.isfinite().all()):
            report = health.health_report(embeddings.float())
            self.trainer.note({"feature_std": report["std"], "rankme": report["rankme"]})
            if self.start is None:
                self.start = dict(report)
        if state.global_step >= 0.2 * state.max_steps:  # a fresh teacher is uniform by nature
            report |= health.entropy_shares(self.trainer.last_metrics)
        if not self.trainer.method.can_collapse:
            report = {}
        report["loss"] = float(self.trainer.last_loss)
        if state.global_step > 1:
            self._warn(health.diagnose(report, self.start), state.global_step)

    def _warn(self, words: list[str], step: int) -> None:
        for sentence in words:
            sign = sentence.split("(")[0]
            if sign not in self.said and distributed.rank() == 0:
                self.said.add(sign)
                logger.warning("Step %d: %s", step, sentence)


class StopCallback(TrainerCallback):
    """Ends a run between two steps, with a checkpoint: on SIGTERM, or when too many images cannot be read."""

    def __init__(self, trainer: "SSLTrainer"):
        self.trainer = trainer
        self.terminated = False
        self.error: Exception | None = None
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.terminated, self.error = False, None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give SIGTERM back to whoever had it; also called when training ends by an exception."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _on_signal(self, *_: Any) -> None:
        self.terminated = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        broken, stop = self.trainer.ledger.distinct, self.terminated
        if args.world_size > 1:
            if state.global_step % _AGREE_EVERY:
                return control
            mine = torch.tensor([float(stop), float(broken)], device=args.device)
            stopping, mean_broken = distributed.all_mean(mine).tolist()
            stop, broken = stopping > 0, round(mean_broken * args.world_size)
        if broken:
            stop = self._too_many(args, broken) or stop
        if stop:
            control.should_save = control.should_training_stop = True
        return control

    def _too_many(self, args: Any, broken: int) -> bool:
        ledger = self.trainer.ledger
        if args.world_size > 1:
            if ledger.total is not None and broken <= args.max_bad_fraction * ledger.total:
                return False  # the sum may count a file twice, so only a suspicion is worth a merge
            ledger = self.trainer.merged_ledger()
        try:
            ledger.check(args.max_bad_fraction)
        except TooManyBadImages as error:
            self.error = error
        return self.error is not None
