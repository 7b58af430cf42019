"""``hf-ssl train``: a plan becomes a run folder with checkpoints, the exported model, a table and a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tables
from .console import CommandError, Stopped, command_line, is_main, masked, quiet, say
from .launch import start_missing_processes
from .plan import Plan, plan_training
from .runfolder import environment, prepare, read_run, write_run

if TYPE_CHECKING:
    from ..data.sources import ImageSource
    from ..modeling import SSLModel
    from ..training.trainer import SSLTrainer

SIGTERM_CODE = 143


def train(argv: Sequence[str]) -> int:
    """The command. Everything that can be wrong with `argv` is said before torch is imported."""
    plan = plan_training(argv)
    start_missing_processes(plan.argv)
    run(plan)
    return 0


@dataclass
class Pictures:
    """What a run trains on and what it is measured on."""

    train: ImageSource
    pairs: list[tables.Pair]  # of the final table; the first one also serves the online kNN

    @property
    def online(self) -> tuple[ImageSource | None, ImageSource | None]:
        return self.pairs[0] if self.pairs else (None, None)


def run(plan: Plan, measures: Sequence[str] = tables.MEASURES) -> list[dict[str, Any]]:
    """Train, export, evaluate, report; the table's rows (empty on all processes but the first)."""
    resume = plan.values.get("resume_from_checkpoint")
    if is_main():
        prepare(plan.output_dir, resume, plan.own["overwrite"])
    quiet()
    pictures = load_pictures(plan)
    trainer = build_trainer(plan, pictures)
    print_header(plan, trainer)
    record = describe(plan, trainer)
    before = float(read_run(plan.output_dir).get("time_seconds") or 0) if resume else 0.0
    started = time.time()
    if is_main():
        write_run(plan.output_dir, record)  # a run that is cut short says at least what it was
    try:
        _train(trainer, resume, plan)
    finally:
        record |= {"steps": trainer.state.global_step, "time_seconds": round(before + time.time() - started, 1)}
        if is_main():
            write_run(plan.output_dir, record)
    record["skipped_images"] = trainer.skipped_images()
    model = trainer.whole_method()
    trainer.save_state()
    if not is_main() or model is None:
        return []
    from ..hub import export

    export(model, trainer.processing_class, plan.output_dir, record)
    record |= {"results": final_table(plan, pictures, measures), "finished": True}
    write_run(plan.output_dir, record)
    export_card(model, plan.output_dir, record)
    if record["results"]:
        tables.print_results(record["results"])
    say(f"model      {plan.output_dir} (for plain transformers; the whole method is in {plan.output_dir / 'ssl'})")
    if not plan.own["no_report"]:
        report(plan.output_dir)
    return record["results"]


def load_pictures(plan: Plan) -> Pictures:
    """The training source and, where there are labels, bank and queries of each protocol."""
    from ..data.sources import load_source
    from ..training.arguments import DataArguments

    data = DataArguments(**plan.group("data"))
    options: dict[str, Any] = {"image_column": data.image_column, "label_column": data.label_column}
    options["streaming"] = data.streaming
    source = load_source(data.dataset, data.split, **options)
    explicit = "eval_split" in plan.values
    specs = (data.eval_dataset,) if data.eval_dataset else tables.protocols(data.dataset)
    wanted = not plan.own["no_evaluation"] or plan.values.get("eval_strategy", "no") != "no"
    found = (tables.labelled_pair(spec, data.split, data.eval_split, explicit, **options) for spec in specs if wanted)
    pairs = [pair for pair in found if pair is not None]
    pairs.sort(key=lambda pair: pair[0].name != data.dataset)
    if not pairs and plan.values.get("eval_strategy", "no") != "no":
        raise CommandError(f"eval_strategy needs labelled images, and {data.dataset} has none; give --eval_dataset.")
    return Pictures(source, pairs)


def build_trainer(plan: Plan, pictures: Pictures) -> SSLTrainer:
    from ..training.arguments import DataArguments, ModelArguments, SSLTrainingArguments
    from ..training.build import build_method, default_arguments
    from ..training.trainer import SSLTrainer

    training = plan.training(default_arguments(plan.method))
    training.pop("resume_from_checkpoint", None)
    training["output_dir"] = str(plan.output_dir)
    training.setdefault("disable_tqdm", not is_main())
    args = SSLTrainingArguments(**training)
    model, processor = build_method(
        plan.method,
        pictures.train,
        ModelArguments(**plan.group("model")),
        plan.group("method"),
        plan.group("views"),
        seed=args.seed,
    )
    buffer = DataArguments(**plan.group("data")).shuffle_buffer
    return SSLTrainer(model, args, pictures.train, processor, *pictures.online, shuffle_buffer=buffer)


def print_header(plan: Plan, trainer: SSLTrainer) -> None:
    args, backbone, source = trainer.args, trainer.method.backbone, trainer.train_source
    paper = trainer.method.paper
    count = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    images = "a stream" if source.num_rows is None else f"{source.num_rows:,} images"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    processes = f" on {args.world_size} processes" if args.world_size > 1 else ""
    start = trainer.method.backbone.config.name_or_path or "random weights"
    say(
        f"{paper.name}: {paper.title} (arXiv:{paper.arxiv})",
        f"backbone   {type(backbone).__name__}, {count:.1f} M parameters, {start}",
        f"data       {source.name}, split {source.split}, {images}",
        f"recipe     {plan.recipe_note}",
        f"training   {length} of {batch} images{processes}, learning rate {args.learning_rate:.4g}, {precision}",
        f"output     {plan.output_dir}",
        "",
    )


def _train(trainer: SSLTrainer, resume: Any, plan: Plan) -> None:
    again = "run the same command with --resume_from_checkpoint true to go on from there"
    if plan.own["overwrite"]:
        again += " (and without --overwrite)"
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        from ..training.trainer import last_complete_checkpoint

        last = last_complete_checkpoint(plan.output_dir)
        words = f"{last} is kept; {again}." if last else "No checkpoint had been written yet."
        raise Stopped(f"Interrupted at step {trainer.state.global_step}. {words}", 130) from None
    finally:
        for callback in trainer.callback_handler.callbacks:  # an open bar would draw itself over what is said next
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.close()
    if trainer.terminated:
        step = trainer.state.global_step
        raise Stopped(f"Stopped by SIGTERM; checkpoint-{step} in {plan.output_dir} is saved; {again}.", SIGTERM_CODE)


def describe(plan: Plan, trainer: SSLTrainer) -> dict[str, Any]:
    """run.json as it stands before the first step."""
    from ..training.build import default_arguments

    start = trainer.method.backbone.config.name_or_path
    record = {
        "method": plan.method,
        "command": command_line(plan.argv),
        "dataset": plan.dataset,
        "seed": trainer.args.seed,
        "environment": environment(trainer.args.world_size),
        "arguments": {
            **plan.values,
            **plan.training(default_arguments(plan.method)),
            "recipe": str(plan.recipe) if plan.recipe else None,
            "learning_rate": trainer.args.learning_rate,
        },
        "skipped_images": {"count": 0, "names": []},
        "results": [],
        "init": {"from_pretrained": start or None, "seed": trainer.args.seed},
        "steps": 0,
        "time_seconds": 0.0,
        "finished": False,
    }
    return masked(record)


def final_table(plan: Plan, pictures: Pictures, measures: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for run.json, measured on the exported model as anybody would load it; [] where nothing can be measured."""
    if plan.own["no_evaluation"]:
        return []
    options = {"max_images": plan.own["table_images"], "progress": False}
    say("")
    try:
        if pictures.pairs:
            return tables.make_table(str(plan.output_dir), None, pictures.pairs, measures, **options)
        say("There are no labelled pictures to test on: spread and rank of the features instead of accuracies.")
        options["max_images"] = min(2000, plan.own["table_images"])
        pair = (pictures.train, pictures.train)
        return tables.make_table(str(plan.output_dir), None, [pair], ("health",), **options)
    except (ValueError, OSError) as error:
        say(f"The table could not be made: {error}")
        return []


def export_card(model: SSLModel, folder: Path, record: dict[str, Any]) -> None:
    """The model card again, now with the results."""
    from ..hub.folder import model_card

    model_card(model.paper, record, type(model.export_backbone).__name__).save(folder / "README.md")


def report(folder: Path) -> None:
    from ..evaluation.report import write_report

    say(f"report     {write_report(folder, progress=False)}")
