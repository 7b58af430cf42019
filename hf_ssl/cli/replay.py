"""``hf-ssl train ... --replay DIR``: the step that ended a run by NaN, once more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import CommandError, command_line, is_secret, quiet, say
from .pictures import load_pictures
from .plan import Plan

_NOT_AGAIN = ("overwrite", "resume_from_checkpoint", "replay", "push_to_hub", "report_to", "no_report")


def replay_command(argv: Sequence[str], folder: Path) -> str:
    """The command that repeats the step that ``folder`` tells of, after the command ``argv`` ended there."""
    kept, dropping = [], False
    for token in argv:
        if token.startswith("--"):
            name = token[2:].partition("=")[0].replace("-", "_")
            dropping = name in _NOT_AGAIN or is_secret(name) or name.startswith("hub_")
        if not dropping:
            kept.append(token)
    command = command_line([*kept, "--replay", str(folder)])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return command
    return command.replace("hf-ssl", f"torchrun --nproc_per_node {processes} -m hf_ssl.cli", 1)


def replay(plan: Plan) -> dict[str, Any]:
    """Train from the last finite checkpoint to the step and say what is found; CommandError where all is finite."""
    from ..training.nonfinite import read_step
    from .train import build_trainer

    folder = Path(plan.own["replay"]).expanduser()
    step = read_step(folder)
    quiet()
    start = str(folder / step["checkpoint"]) if step["checkpoint"] else None
    plan.values |= {"output_dir": str(folder / "again"), "resume_from_checkpoint": start, "report_to": "none"}
    plan.values |= {"push_to_hub": False, "save_strategy": "no", "eval_strategy": "no"}
    plan.values |= {"load_best_model_at_end": False}
    trainer = build_trainer(plan, load_pictures(plan))
    say(f"From {step['checkpoint'] or 'the start'} to step {step['step']} of the run in {folder.parent}:")
    try:
        found = trainer.replay(folder)
    finally:
        with contextlib.suppress(OSError):
            (folder / "again").rmdir()
    if not found["reproduced"]:
        raise CommandError(f"Up to step {step['step']} all is finite now: something about the run is not the same.")
    say(
        f"step       {found['step']} is NaN or infinite again",
        f"loss       and norm of the gradient: {', '.join(map(str, found['values']))}",
        f"rows       {found['rows']}",
        f"output     the first that is not finite: {found['module'] or 'none'}",
        f"weights    not finite after the step: {', '.join(found['weights'][:5]) or 'none'}",
    )
    return found
