"""``hf-ssl demo``: SimCLR on the built-in emoji, from nothing to a model, a table and a report, on two cores."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from .commands import loading_lines
from .console import CommandError, UsageError, is_main, say
from .fields import Flag
from .flags import Parsed
from .plan import Plan, plan_training
from .runfolder import clear, cpus, held_run, lock_folder, read_run

METHOD, DATASET = "simclr", "emoji:placed"
FLAGS = (
    Flag("output_dir", ("str",), "./hf-ssl-demo", "Where the run goes."),
    Flag(
        "steps",
        ("int",),
        None,
        "Training steps; default: the recipe's, about 5 minutes on 2 cores.",
        optional=True,
        limits="[1, inf)",
    ),
    Flag(
        "seed",
        ("int",),
        None,
        "Seed of weights and views; default: the recipe's.",
        optional=True,
        limits="[0, 4294967295]",
    ),
    Flag("threads", ("int",), None, "Cores to use; default: all.", optional=True, limits="[1, inf)"),
    Flag("no_report", ("bool",), False, "Do not write report.html."),
)


def demo(parsed: Parsed) -> int:
    if parsed.words:
        raise UsageError(f"demo: {parsed.words[0]!r} is one word too many; the demo needs none.")
    plan = make_plan(parsed)
    folder = plan.output_dir
    with lock_folder(folder) if is_main() else nullcontext():
        _run(parsed, plan)
    say("", "Load it anywhere, without hf_ssl:", *loading_lines(folder), "")
    return 0


def _run(parsed: Parsed, plan: Plan) -> None:
    folder = plan.output_dir
    if is_main() and (held := held_run(folder)):
        if not str(read_run(folder).get("command")).startswith("hf-ssl demo"):
            raise CommandError(f"demo: {folder} holds something else ({held}); choose another --output_dir.")
        say(f"Replacing the earlier demo in {folder}.")
        clear(folder)
    _, threads = divide(parsed.values.get("threads") or cpus())
    import torch

    torch.set_num_threads(threads)
    from .train import run

    run(plan, measures=("knn", "retrieval", "health"))  # a linear probe on raw pixels takes longer than the rest


def make_plan(parsed: Parsed) -> Plan:
    """The demo as the ``train`` command that it is."""
    workers, _ = divide(parsed.values.get("threads") or cpus())
    folder = Path(parsed.values.get("output_dir") or FLAGS[0].default)
    argv = [METHOD, "--dataset", DATASET, "--output_dir", str(folder), "--dataloader_num_workers", str(workers)]
    for flag, name in (("steps", "max_steps"), ("seed", "seed")):
        if parsed.values.get(flag) is not None:
            argv += [f"--{name}", str(parsed.values[flag])]
    if parsed.values.get("no_report"):
        argv.append("--no_report")
    plan = plan_training(argv)
    plan.argv = ["demo"] + [f"--{name}={value}" for name, value in parsed.values.items()]
    return plan


def divide(cores: int) -> tuple[int, int]:
    """(workers, torch threads): drawing views costs about a fifth of a step, so one worker serves several threads."""
    workers = max(1, min(8, cores // 3))
    return workers, max(1, cores - workers + (cores <= 2))
