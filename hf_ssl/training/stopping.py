"""When a run saves and when it stops before its end: by the clock, on a signal, when images or processes are lost."""

import os
import re
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from .. import distributed
from ..data.collator import TooManyBadImages

if TYPE_CHECKING:
    from .trainer import SSLTrainer

_AGREE_STEPS = 10  # at most so many steps between the ranks' agreements: each waits for the device
_AGREE_SECONDS = 5.0  # and where steps are long, about so many seconds
_LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|remote process exited|Timed out waiting|gloo|NCCL", re.I)


class ProcessLost(RuntimeError):
    """Another process of the run ended or does not answer, so this one cannot go on."""


def process_lost(error: BaseException) -> bool:
    """Whether ``error`` is what torch raises in the processes that remain when one of a run has ended."""
    if distributed.world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or bool(_LOST.search(str(error)))


class StopCallback(TrainerCallback):
    """Saves by the clock, and ends a run between two steps with a checkpoint: on SIGTERM or Ctrl-C, or when too many
    images cannot be read. All ranks agree on each. A second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self, trainer: "SSLTrainer"):
        self.trainer = trainer
        self.stopped: int | None = None  # the signal that ends the run
        self.error: Exception | None = None
        self._previous: dict[int, Any] = {}
        self._interrupts = 0
        self._saved_at = self._agreed_at = 0.0  # seconds
        self._saved_step, self._agreed_step, self._agree_step = -1, 0, 0

    # --- signals --------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped, self.error, self._saved_step, self._interrupts = None, None, -1, 0
        self._saved_at = self._agreed_at = time.monotonic()
        self._agreed_step, self._agree_step = state.global_step, state.global_step + 1
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGTERM:
                self._previous[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Restore the signals' earlier handlers; also called when training ends by an exception."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _on_signal(self, number: int, *_: Any) -> None:
        self.stopped = self.stopped or number
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts > 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT and distributed.rank() == 0:
            # by os.write: the signal may have come in the middle of a print
            os.write(2, b"\nStopping after this step, with a checkpoint. Ctrl-C again quits at once.\n")

    # --- between two steps ----------------------------------------------------------------------------------------

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        broken = self.trainer.ledger.distinct
        due = args.saves_by_time and time.monotonic() - self._saved_at >= 60 * args.save_minutes
        if args.world_size > 1:
            if state.global_step < self._agree_step:
                return control
            broken, due = self._agree(args, state.global_step, broken, due)
        control.should_save = control.should_save or due
        if (broken and self._too_many(args, broken)) or self.stopped is not None:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved_at, self._saved_step = time.monotonic(), state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A signal that came after the ranks' last agreement stops all of them as well."""
        if args.world_size > 1:
            self._agree(args, state.global_step, 0, False)
        if self.stopped is not None and not self.trainer.nothing_left and self._saved_step != state.global_step:
            self.trainer.save_checkpoint()
        self.restore()

    def _agree(self, args: Any, step: int, broken: int, due: bool) -> tuple[int, bool]:
        """Sum of the ranks' broken images, and whether the first one's clock says save; signals reach all of them."""
        now = time.monotonic()
        pace = (now - self._agreed_at) / max(step - self._agreed_step, 1)
        signals = [float(self.stopped == number) for number in (signal.SIGINT, signal.SIGTERM)]
        mine = [*signals, float(broken), float(due and args.process_index == 0), pace]
        means = distributed.all_mean(torch.tensor(mine, dtype=torch.float32, device=args.device)).tolist()
        for number, share in zip((signal.SIGINT, signal.SIGTERM), means):
            if share > 0:
                self.stopped = number
        self._agreed_at, self._agreed_step = now, step
        self._agree_step = step + max(1, min(_AGREE_STEPS, int(_AGREE_SECONDS / max(means[4], 1e-6))))
        return round(means[2] * args.world_size), means[3] > 0

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
