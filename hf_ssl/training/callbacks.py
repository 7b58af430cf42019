"""What happens around an optimiser step: the method's own hooks, and warnings of collapse."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from .. import distributed, schedules
from ..evaluation import health
from ..untouched import untouched
from .optim import clip_per_module, clip_per_tensor

if TYPE_CHECKING:
    from .trainer import SSLTrainer

logger = logging.getLogger("hf_ssl.training")


class MethodCallback(TrainerCallback):
    """Schedules and gradient hooks before, EMA, centres and the step counter after: once per optimiser step."""

    def __init__(self, trainer: "SSLTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.method.total_steps.fill_(state.max_steps)
        if state.global_step == 0:  # dropout differs between ranks; a resumed run restores its own states
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

    @untouched()
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
