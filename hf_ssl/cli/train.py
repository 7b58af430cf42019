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
from .launch import start_missing_processes
from .pictures import Pictures, kind_arguments, load_pictures
from .plan import Plan, check_dataset, plan_training
from .publish import push
from .replay import replay, replay_command
from .runfolder import lock_folder, prepare, read_run, write_run

if TYPE_CHECKING:
    from ..data.splits import Division
    from ..modeling import SSLModel
    from ..training.trainer import SSLTrainer

SIGINT_CODE, SIGTERM_CODE = 130, 143


def train(argv: Sequence[str]) -> int:
    """The command. Everything that can be wrong with `argv` is reported before torch is imported."""
    plan = plan_training(argv)
    check_dataset(plan)
    start_missing_processes(plan.argv)
    try:
        replay(plan) if plan.own["replay"] else run(plan)
    except RuntimeError as error:
        from ..training.stopping import ProcessLost, process_lost

        if not process_lost(error) or isinstance(error, ProcessLost):
            raise
        raise CommandError(f"another process of this run has ended or does not answer{_kept(plan)}") from error
    _leave_processes()
    return 0


def _leave_processes() -> None:
    from ..distributed import leave

    leave()


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
    trainer = _fitting_trainer(plan, pictures)
    print_header(plan, trainer, pictures)
    record = describe(plan, trainer, pictures)
    facts = ("command", "dataset", "evaluated_on", "arguments", "division")
    trainer.card_facts = {name: record[name] for name in facts}
    _train_and_record(trainer, resume, plan, record)
    record["skipped_images"] = trainer.skipped_images()
    model = trainer.whole_method()
    trainer.save_state()
    if not is_main() or model is None:
        return []
    _write_results(plan, trainer, model, record, pictures, measures)
    if not plan.own["no_report"]:
        report(plan.output_dir)
    if (args := trainer.args).push_to_hub:
        trainer._finish_current_push()
        options: dict[str, Any] = {"token": args.hub_token, "revision": args.hub_revision}
        where = push(plan.output_dir, str(trainer.hub_model_id), record, message="End of training", **options)
        say(f"published  {where}")
    return record["results"]


def _fitting_trainer(plan: Plan, pictures: Pictures) -> SSLTrainer:
    """``build_trainer``; CommandError where the memory does not hold the model."""
    try:
        return build_trainer(plan, pictures)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        numbers = largest({**plan.group("method"), **plan.group("model"), **plan.group(plan.reads)})
        raise CommandError(f"The model does not fit into the memory; its largest numbers are {numbers}.") from error


def _train_and_record(trainer: SSLTrainer, resume: Any, plan: Plan, record: dict[str, Any]) -> None:
    """Train; ``record`` and run.json then hold steps and time, however training ended."""
    before = float(read_run(plan.output_dir).get("time_seconds") or 0) if resume else 0.0
    started = time.time()
    if is_main():
        write_run(plan.output_dir, record)  # a run that is cut short says at least what it was
    try:
        _train(trainer, resume, plan)
    except CommandError as error:
        record["stopped"] = str(error)
        raise
    finally:
        record |= {"steps": trainer.state.global_step, "time_seconds": round(before + time.time() - started, 1)}
        record |= trainer.precision_facts()
        if is_main():
            write_run(plan.output_dir, record)


def _write_results(
    plan: Plan,
    trainer: SSLTrainer,
    model: SSLModel,
    record: dict[str, Any],
    pictures: Pictures,
    measures: Sequence[str] | None,
) -> None:
    """The exported model, its table and its card."""
    from ..hub import write_card, write_model
    from ..training.publish import published_facts

    record |= (published := published_facts(model))
    write_run(plan.output_dir, record)  # the table asks it which weights these are
    write_model(model, trainer.processing_class, plan.output_dir, record)  # what the table measures
    record |= {"results": final_table(plan, pictures, measures), "finished": True}
    write_run(plan.output_dir, record)
    write_card(model, plan.output_dir, record)
    if record["results"]:
        tables.print_results(record["results"])
    if published:
        say("weights    the {weights} weights are published: {why}".format(**record["published"]))
    say(f"model      {plan.output_dir} (for plain transformers; the whole method is in {plan.output_dir / 'ssl'})")


def build_trainer(plan: Plan, pictures: Pictures) -> SSLTrainer:
    from ..training.arguments import DataArguments, ModelArguments, SSLTrainingArguments
    from ..training.build import build_method, default_arguments
    from ..training.checkpoints import last_complete_checkpoint
    from ..training.trainer import SSLTrainer

    training = plan.training(default_arguments(plan.method))
    resume = training.pop("resume_from_checkpoint", None)
    training["output_dir"] = str(plan.output_dir)
    training.setdefault("disable_tqdm", not is_main())
    labeled = pictures.sources.labeled
    args = SSLTrainingArguments(**training)
    model, processor = build_method(
        plan.method,
        pictures.sources.train,
        ModelArguments(**plan.group("model")),
        plan.group("method"),
        plan.group("views"),
        seed=args.seed,
        class_names=None if labeled is None else labeled.rows.names,
        kind_args=kind_arguments(plan),
        resume=last_complete_checkpoint(plan.output_dir) if resume is True else resume,
    )
    return SSLTrainer(
        model,
        args,
        pictures.sources.train,
        processor,
        *pictures.online,
        shuffle_buffer=DataArguments(**plan.group("data")).shuffle_buffer,
        labeled=labeled,
    )


def check_division(plan: Plan, pictures: Pictures, resume: Any) -> None:
    """Refuse to go on with other rows set apart than the run began with: it may have trained on them.

    Where neither sets rows of the training split apart, the checkpoint's settings tell what changed.
    """
    earlier = read_run(plan.output_dir) if resume else {}
    if not earlier.get("steps"):
        return
    names, now = ("train", "validation", "test"), pictures.division.record()
    before = earlier.get("division")
    if before is None:  # a run of the time when only rows that validate were kept out of training
        before = {**now, "test": 0} if now["train"] != now["of"] and not now["validation"] else now
    sets_apart = any(each.get("of", each.get("train")) != each.get("train") for each in (before, now))
    if sets_apart and any(before.get(name) != now[name] for name in names):
        was, is_now = (", ".join(f"{each.get(name)} {name}" for name in names) for each in (before, now))
        raise CommandError(
            f"The run in {plan.output_dir} divided its pictures otherwise ({was}; now {is_now}): resume it with the "
            "same pictures, splits and evaluation flags, or start a new run."
        )


def print_header(plan: Plan, trainer: SSLTrainer, pictures: Pictures) -> None:
    args, backbone, source = trainer.args, trainer.method.backbone, trainer.train_source
    paper = trainer.method.paper
    count = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    images = "a stream" if source.num_rows is None else f"{source.num_rows:,} images"
    if trainer.labeled is not None:
        rows = trainer.labeled.rows
        images += f"; {len(rows.rows):,} labels of {len(rows.names)} classes ({rows.rule})"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    kind = "images"
    if trainer.labeled is not None:
        kind = f"labelled and {batch * trainer.labeled.unlabeled_ratio} unlabelled images"
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else f"precision {args.precision}"
    processes = f" on {args.world_size} processes" if args.world_size > 1 else ""
    start = trainer.method.backbone.config.name_or_path or "random weights"
    say(
        f"{paper.name}: {paper.title} (arXiv:{paper.arxiv})",
        f"backbone   {type(backbone).__name__}, {count:.1f} M parameters, {start}",
        f"data       {source.name}, split {source.split}, {images}",
        f"rows       {rows_of(pictures.division)}",
        f"recipe     {plan.recipe_note}",
        f"training   {length} of {batch} {kind}{processes}, learning rate {args.learning_rate:.4g}, {precision}",
        *_header_of_weights(trainer),
        f"output     {plan.output_dir}",
        "",
    )


def _header_of_weights(trainer: SSLTrainer) -> list[str]:
    """Which weights a run of this length publishes, where that is not the average of the method's paper."""
    steps = round(trainer._planned_steps())
    weights, why = trainer.method.chosen_weights(steps, steps) if steps else ("average", "")
    said = f"weights    the last ones, not their average, will be published: {why}"
    return [said] if why and weights == "last" else []


def rows_of(division: Division) -> str:
    """How many images train, validate and test."""
    counts = division.record()
    train, validation, test = (
        "a stream" if counts[name] is None else f"{counts[name]:,}" for name in ("train", "validation", "test")
    )
    train += "" if counts["of"] in (None, counts["train"]) else f" of {counts['of']:,} images"
    return f"{train} to train on, {validation} to validate, {test} to test"


def _train(trainer: SSLTrainer, resume: Any, plan: Plan) -> None:
    from ..training.nonfinite import StoppedAtNonFinite
    from ..training.stopping import ProcessLost

    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        raise Stopped(f"Stopped by Ctrl-C at step {trainer.state.global_step}{_kept(plan)}", SIGINT_CODE) from None
    except ProcessLost as error:
        raise CommandError(f"{error}{_kept(plan)}") from error
    except StoppedAtNonFinite as error:
        again = f" To see the step again: {replay_command(plan.argv, error.folder)}" if error.folder else ""
        raise CommandError(error.words + again) from error
    finally:
        for callback in trainer.callback_handler.callbacks:  # an open bar would draw itself over what is said next
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.close()
    if trainer.terminated:
        raise Stopped(f"Stopped by SIGTERM at step {trainer.state.global_step}{_kept(plan)}", SIGTERM_CODE)


def _kept(plan: Plan) -> str:
    """How to go on with a run that was cut short."""
    from ..training.checkpoints import last_complete_checkpoint

    last = last_complete_checkpoint(plan.output_dir)
    if last is None:
        return ". No checkpoint had been written yet; the same command with --overwrite begins again."
    without = " (and without --overwrite)" if plan.own["overwrite"] else ""
    return f"; {last} is saved. Run the same command with --resume_from_checkpoint true{without} to go on from there."


def describe(plan: Plan, trainer: SSLTrainer, pictures: Pictures) -> dict[str, Any]:
    """run.json as it stands before the first step."""
    from ..evaluation.evaluate import PROTOCOL_NAMES
    from ..training.build import default_arguments

    record = {
        **trainer.run_record(),
        "method": plan.method,
        "command": command_line(plan.argv),
        "dataset": plan.dataset,
        "division": pictures.record(),
        "evaluated_on": {
            PROTOCOL_NAMES.get(test.name, test.name): {"dataset": test.name, "split": test.split}
            for _, test in pictures.pairs
        },
        "arguments": {
            **plan.values,
            **plan.training(default_arguments(plan.method)),
            "recipe": str(plan.recipe) if plan.recipe else None,
            "learning_rate": trainer.args.learning_rate,
        },
        "skipped_images": {"count": 0, "names": []},
        "results": [],
        "steps": 0,
        "time_seconds": 0.0,
        "finished": False,
    }
    return masked(record)


def final_table(plan: Plan, pictures: Pictures, measures: Sequence[str] | None) -> list[dict[str, Any]]:
    """Rows for run.json, measured on the exported model as anybody would load it; [] where nothing can be measured."""
    if plan.own["no_evaluation"]:
        return []
    options: dict[str, Any] = {"max_images": plan.own["table_images"], "progress": False}
    say("")
    try:
        if pictures.pairs:
            if pictures.sources.labeled is not None:
                options["others"] = tables.other_weights(plan.output_dir)
            return tables.make_table(str(plan.output_dir), None, pictures.pairs, measures, **options)
        say("There are no labelled pictures to test on: spread and rank of the features instead of accuracies.")
        options["max_images"] = min(2000, plan.own["table_images"])
        pair = (pictures.sources.train, pictures.sources.train)
        return tables.make_table(str(plan.output_dir), None, [pair], ("health",), **options)
    except (ValueError, OSError) as error:
        say(f"The table could not be made: {error}")
        return []


def report(folder: Path) -> None:
    from ..evaluation.report import write_report

    say(f"report     {write_report(folder, progress=False)}")
