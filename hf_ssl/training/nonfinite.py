"""A run whose loss or gradient turns NaN or infinite stops, keeps its last finite checkpoint and can repeat the step.

OUTPUT_DIR/nonfinite then holds step.json (the step, its loss, the row numbers of its images, seed, processes), the
precision, and the last finite checkpoint as links, out of rotation's reach. Resuming is exact: what goes on from there
meets the step again.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from .. import distributed
from ..data.collator import Batch
from ..documents import read_json
from ..finite import NonFiniteError, in_words, not_finite
from . import precision
from .publish import link

if TYPE_CHECKING:
    from .trainer import SSLTrainer

FOLDER, STEP_FILE = "nonfinite", "step.json"
READ_EVERY = 10  # steps; reading waits for the device, and in several processes for the others


class StoppedAtNonFinite(NonFiniteError):
    """Training stopped. step: the first seen not to be finite; folder: what repeats it, None if the disk is full."""

    def __init__(self, words: str, step: int, folder: Path | None):
        again = f" A trainer built alike repeats the step: trainer.replay({str(folder)!r})." if folder else ""
        super().__init__(words + again)
        self.words, self.step, self.folder = words, step, folder


class NonFiniteCallback(TrainerCallback):
    """Counts steps in a row whose loss or gradient is NaN or infinite, without waiting for the device at each.

    A step that the loss scaler of fp16 skips is normal: of it the loss alone counts.
    """

    def __init__(self, trainer: "SSLTrainer"):
        self.trainer = trainer
        self.replaying = False
        self.checkpoint: Path | None = None  # the last that this run wrote or resumed from: always finite
        self.grad_norm: Any = None
        self.last: tuple[int, list[float]] = (0, [])  # the last step read: its losses, then its gradient norm
        self._reset()

    def _reset(self) -> None:
        self._losses: list[Tensor] = []  # of the micro-batches of the step that runs
        self._pending: list[tuple[int, list[Tensor]]] = []  # steps not yet read, and what was noted of them
        self._rows: dict[int, list[dict[str, bytes]]] = {}
        self._streak, self._first = 0, 0
        self._told: list[float] = []  # of the first step of the streak

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reset()

    def note_rows(self, step: int, batches: Sequence[Any]) -> None:
        """The batches that ``step`` will train on."""
        self._rows[step] = [batch.rows for batch in batches if isinstance(batch, Batch)]
        oldest = self._first or (self._pending[0][0] if self._pending else step - 1)
        for known in [known for known in self._rows if known < oldest]:
            del self._rows[known]

    def rows_of(self, step: int) -> list[dict[str, list[int]]]:
        """Of each micro-batch of a recent step the row numbers."""
        return [Batch({}, rows).row_numbers() for rows in self._rows.get(step, [])]

    def note_loss(self, loss: Tensor) -> None:
        self._losses.append(loss.detach().clone())  # a compiled step may use its memory again

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        skipped = getattr(optimizer, "step_was_skipped", False)
        norm = [] if skipped or self.grad_norm is None else [torch.as_tensor(self.grad_norm)]
        self._pending.append((state.global_step, self._losses + norm))
        self._losses, self.grad_norm = [], None
        waits = args.device.type == "cpu" or control.should_log or control.should_save
        if state.global_step % READ_EVERY == 0 or (args.world_size == 1 and waits):
            self.read()

    def read(self) -> None:
        """Look at the steps noted so far; raises on every process where too many in a row were not finite."""
        steps, self._pending = self._pending, []
        if not steps:
            return
        device = self.trainer.args.device
        found = torch.stack([value.to(device, torch.float32) for _, values in steps for value in values]).tolist()
        parts = [[found.pop(0) for _ in values] for _, values in steps]
        wrong = [not all(map(math.isfinite, part)) for part in parts]
        if distributed.world_size() > 1:
            flags = torch.tensor(wrong, dtype=torch.float32, device=device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            wrong = flags.bool().tolist()
        for (step, _), part, bad in zip(steps, parts, wrong):
            self._count(step, part, bad)

    def _count(self, step: int, part: list[float], bad: bool) -> None:
        self.last = (step, part)
        if not bad:
            self._streak = self._first = 0
            return
        if not self._streak:
            self._first, self._told = step, part
        self._streak += 1
        if self._streak >= self.trainer.args.nonfinite_steps:
            self._stop(f"The loss or its gradient was NaN or infinite in {self._streak} steps in a row, from")

    def check_weights(self, when: str) -> None:
        """Every process calls it before the weights are used; all raise where a process's are not finite."""
        self.read()
        names = not_finite(self.trainer.method)
        everyone = [names] * distributed.world_size()
        if len(everyone) > 1:
            dist.all_gather_object(everyone, names)
        if names := next(filter(None, everyone), []):
            since = "the loss or its gradient since" if self._first else "seen first in"
            self._first = self._first or self.trainer.state.global_step
            self._stop(f"{in_words(names)} NaN or infinite {when}; {since}")

    def _stop(self, words: str) -> None:
        if self.replaying:
            return
        trainer, step = self.trainer, self._first
        mine = self.rows_of(step)
        ranks = [mine] * distributed.world_size()
        if len(ranks) > 1:
            dist.all_gather_object(ranks, mine)
        folder = distributed.from_first(lambda: _write(trainer, step, self._told, ranks, self.checkpoint))
        kept = f"{self.checkpoint} is finite and kept." if self.checkpoint else "No checkpoint had been written."
        half = trainer.precision is not None and trainer.precision.precision != "fp32"
        advice = f"Lower the learning rate or lengthen the warm-up{', or train in float32' if half else ''}."
        raise StoppedAtNonFinite(f"{words} step {step}. {kept} {advice}", step, folder)


def _write(
    trainer: "SSLTrainer", step: int, told: list[float], ranks: list[Any], checkpoint: Path | None
) -> Path | None:
    """OUTPUT_DIR/nonfinite; None where the disk does not take it."""
    folder, args = Path(str(trainer.args.output_dir), FOLDER), trainer.args
    facts = {
        "step": step,
        "losses_and_gradient_norm": [str(value) for value in told],  # JSON has no NaN
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "seed": args.seed,
        "processes": args.world_size,
        "micro_batches": ranks,  # per process, per micro-batch: the row numbers
    }
    scratch = folder.with_name(f".{FOLDER}")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        if checkpoint is not None:  # it may lie in an earlier one of these folders
            shutil.copytree(checkpoint, scratch / checkpoint.name, copy_function=link)
        if trainer.precision is not None:
            (scratch / precision.FILE).write_text(json.dumps(precision.to_dict(trainer.method, trainer.precision)))
        trainer.state.save_to_json(str(scratch / "trainer_state.json"))
        (scratch / STEP_FILE).write_text(json.dumps(facts))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        return None
    return folder


# --- once more ----------------------------------------------------------------------------------------------------


def read_step(folder: str | Path) -> dict[str, Any]:
    """step.json of a nonfinite folder; FileNotFoundError where there is none."""
    file = Path(folder, STEP_FILE)
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {STEP_FILE}: name the {FOLDER} folder that a stopped run left")
    found: dict[str, Any] = read_json(file)
    return found


def replay(trainer: "SSLTrainer", folder: str | Path) -> dict[str, Any]:
    """Train from the last finite checkpoint, or from the start, to the first bad step: see ``SSLTrainer.replay``."""
    told, args, watch = read_step(folder), trainer.args, trainer.nonfinite
    if args.world_size != told["processes"]:
        raise ValueError(f"the step was one of {told['processes']} process(es), this is a run of {args.world_size}")
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"  # type: ignore[assignment]
    args.load_best_model_at_end = args.push_to_hub = False
    again = _Again(trainer, told["step"])
    trainer.precision_of, watch.replaying = str(folder), True
    trainer.add_callback(again)
    try:
        trainer.train(resume_from_checkpoint=str(Path(folder, told["checkpoint"])) if told["checkpoint"] else None)
    finally:
        again.close()
        trainer.remove_callback(again)
        trainer.precision_of, watch.replaying = None, False
    return again.found


class _Again(TrainerCallback):
    """Stops after the first step that is not finite, at ``latest``, and notes what was not."""

    def __init__(self, trainer: "SSLTrainer", latest: int):
        self.trainer, self.latest = trainer, latest
        self.found: dict[str, Any] = {}
        self.module: str | None = None
        named = trainer.method.named_modules()
        self._hooks = [module.register_forward_hook(self._hook(name)) for name, module in named]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.module = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watch, weights = self.trainer.nonfinite, not_finite(self.trainer.method)
        watch.read()
        step, values = watch.last
        bad = bool(weights) or not all(map(math.isfinite, values))
        self.found = {
            "reproduced": bad, "step": step, "values": values, "module": self.module if bad else None,
            "weights": weights, "rows": watch.rows_of(step),
        }  # fmt: skip
        if bad or step >= self.latest:
            control.should_training_stop = True

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if self.module is None and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                self.module = name

        return look

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
