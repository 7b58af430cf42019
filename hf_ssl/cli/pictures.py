"""What a run trains on and what it is measured on, from a plan's data and label flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tables
from .console import CommandError, say
from .plan import Plan

if TYPE_CHECKING:
    from ..data.sources import ImageSource
    from ..data.splits import Division, Pair
    from ..training.kinds import Sources


@dataclass
class Pictures:
    """The sources of a run."""

    sources: Sources
    division: Division

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """(bank, queries) of the final table."""
        return self.division.tests

    @property
    def online(self) -> tuple[ImageSource | None, ImageSource | None]:
        """Bank and queries while training."""
        return self.division.online

    def record(self) -> dict[str, Any]:
        """What run.json says of the rows that train, validate and test."""
        return {**self.division.record(), "unlabeled": self.sources.unlabeled}


def load_pictures(plan: Plan) -> Pictures:
    """The training source and, where there are labels, bank and queries of each protocol. Decodes nothing."""
    from transformers import TrainingArguments

    from ..data.splits import divide
    from ..training.arguments import DataArguments
    from ..training.kinds import kind_of

    data, kind = DataArguments(**plan.group("data")), kind_of(plan.reads)
    kind_args = kind_arguments(plan)
    if data.validation_split is not None and data.validation_fraction is not None:
        raise CommandError("Give --validation_split or --validation_fraction, not both.")
    columns: dict[str, Any] = {"image_column": data.image_column, "label_column": data.label_column}
    if (channels := plan.group("model").get("num_channels")) in (1, 3, 4):  # what files can be decoded to
        columns["channels"] = channels
    columns |= kind.source_options(kind_args)
    options = {**columns, "streaming": data.streaming, "allow_outside_files": data.allow_outside_files}
    evaluates = plan.values.get("eval_strategy", "no") != "no"
    wanted = not plan.own["no_evaluation"] or evaluates
    specs = (data.eval_dataset,) if data.eval_dataset else tables.protocols(data.dataset)
    division = divide(
        data.dataset, data.split, specs if wanted else (), data.eval_split, "eval_split" in plan.values,
        data.validation_split, data.validation_fraction, data.eval_dataset, kind.tested_by_texts,
        **options,
    )  # fmt: skip
    if evaluates and division.online == (None, None):
        raise CommandError(f"eval_strategy needs labelled images, and {data.dataset} has none; give --eval_dataset.")
    said, seed = list(division.said), plan.values.get("seed", TrainingArguments.seed)
    pictures = Pictures(kind.sources(division, data, kind_args, seed, options, said), division)
    _check_start(plan, pictures, said)
    say(*said)
    return pictures


def _check_start(plan: Plan, pictures: Pictures, said: list[str]) -> None:
    """Pictures that are scored may be known to the run that a warm start comes from."""
    from ..data.splits import trained_on
    from .runfolder import read_run

    start = plan.values.get("backbone")
    run = read_run(Path(start).expanduser()) if isinstance(start, str) and Path(start).expanduser().is_dir() else {}
    for queries in pictures.division.held if run else ():
        if sentence := trained_on(run, queries)[1]:
            said.append(f"This run starts from that in {start}. {sentence}")


def kind_arguments(plan: Plan) -> Any:
    """The arguments of the kind of data that the method reads; None where it has none."""
    from ..training.kinds import kind_of

    arguments = kind_of(plan.reads).arguments
    return None if arguments is None else arguments(**plan.group(plan.reads))
