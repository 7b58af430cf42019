"""``hf-ssl train``: a plan becomes a run folder with checkpoints, the exported model, a table and a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tables
from .console import CommandError, Stopped, command_line, is_main, masked, quiet, say
from .faults import is_out_of_memory, largest
from .launch import leave_processes, start_missing_processes
from .pictures import Pictures, load_pictures
from .plan import Plan, check_dataset, plan_training
from .publish import push
from .runfolder import lock_folder, prepare, read_run, write_run

if TYPE_CHECKING:
    from ..data.splits import Division
    from ..training.trainer import SSLTrainer

SIGINT_CODE, SIGTERM_CODE = 130, 143


def train(argv: Sequence[str]) -> int:
    """The command. Everything that can be wrong with `argv` is said before torch is imported."""
    plan = plan_training(argv)
    check_dataset(plan)
    start_missing_processes(plan.argv)
    try:
        run(plan)
    except RuntimeError as error:
        from ..training.stopping import ProcessLost, process_lost

        if not process_lost(error) or isinstance(error, ProcessLost):
            raise
        raise CommandError(f"another process of this run has ended or does not answer{_kept(plan)}") from error
    leave_processes()
    return 0


def run(plan: Plan, measures: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, export, evaluate, report; the table's rows (empty on all processes but the first).

    measures: of the final table; None takes what suits the model.
    """
    with lock_folder(plan.output_dir) if is_main() else nullcontext():
        return _run(plan, measures)


def _run(plan: Plan, measures: Sequence[str] | None) -> list[dict[str, Any]]:
    resume = plan.values.get("resume_from_checkpoint")
    if is_main():
        prepare(plan.output_dir, resume, plan.own["overwrite"])
    quiet()
    pictures = load_pictures(plan)
    check_division(plan, pictures, resume)
    try:
        trainer = build_trainer(plan, pictures)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        numbers = largest({**plan.group("method"), **plan.group("model"), **plan.group("text")})
        raise CommandError(f"The model does not fit into the memory; its largest numbers are {numbers}.") from error
    print_header(plan, trainer, pictures)
