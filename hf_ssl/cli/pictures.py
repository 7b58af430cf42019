"""What a run trains on and what it is measured on, from a plan's data and label flags."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tables
from .console import CommandError, say
from .fields import stated
from .plan import Plan

if TYPE_CHECKING:
    from ..data.labels import LabeledRows
    from ..data.sources import ImageSource
    from ..data.splits import Division, Pair
    from ..training.arguments import DataArguments


@dataclass
class Pictures:
    """The sources of a run."""

    train: ImageSource  # for a semi-supervised method: the images without labels
    division: Division
    labeled: ImageSource | None = None
    labeled_rows: LabeledRows | None = None
    unlabeled_ratio: int = 0
    unlabeled: dict[str, Any] | None = None  # dataset and split of the images without labels, where they are others

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
        return {**self.division.record(), "unlabeled": self.unlabeled}


def load_pictures(plan: Plan) -> Pictures:
    """The training source and, where there are labels, bank and queries of each protocol. Decodes nothing."""
    from ..data.splits import divide
    from ..training.arguments import DataArguments

    data = DataArguments(**plan.group("data"))
    reads = stated(plan.method, "reads")
    if data.validation_split is not None and data.validation_fraction is not None:
        raise CommandError("Give --validation_split or --validation_fraction, not both.")
    columns: dict[str, Any] = {"image_column": data.image_column, "label_column": data.label_column}
    if (channels := plan.group("model").get("num_channels")) in (1, 3, 4):  # what files can be decoded to
        columns["channels"] = channels
    if reads == "texts":
        columns["caption_column"] = plan.group("text").get("caption_column")
    options = {**columns, "streaming": data.streaming, "allow_outside_files": data.allow_outside_files}
    evaluates = plan.values.get("eval_strategy", "no") != "no"
    wanted = not plan.own["no_evaluation"] or evaluates
    specs = (data.eval_dataset,) if data.eval_dataset else tables.protocols(data.dataset)
    division = divide(
        data.dataset, data.split, specs if wanted else (), data.eval_split, "eval_split" in plan.values,
        data.validation_split, data.validation_fraction, data.eval_dataset, reads == "texts",
        **options,
    )  # fmt: skip
    if evaluates and division.online == (None, None):
        raise CommandError(f"eval_strategy needs labelled images, and {data.dataset} has none; give --eval_dataset.")
    pictures = Pictures(division.train, division)
    said = list(division.said)
    if reads == "labels":
        _draw_labels(pictures, plan, data, options, said)
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


def _draw_labels(
    pictures: Pictures, plan: Plan, data: DataArguments, options: dict[str, Any], said: list[str]
) -> None:
    """Choose the labelled rows of the training source; what remains to train on beside them follows."""
    from transformers import TrainingArguments

    from ..data.labels import draw_labeled
    from ..data.same import placed
    from ..data.sources import load_source
    from ..data.splits import free, whole_of
    from ..training.arguments import LabelArguments

    labels = LabelArguments(**plan.group("labels"))
    seed = labels.label_seed
    if seed is None:
        seed = plan.values.get("seed", TrainingArguments.seed)
    source = pictures.train
    pictures.labeled, pictures.labeled_rows = draw_labeled(
        source, data.label_column, labels.labels_per_class, labels.label_fraction, labels.label_ids, seed
    )
    pictures.unlabeled_ratio = labels.unlabeled_ratio
    if labels.unlabeled_dataset:
        own = {**options, "label_column": None, "image_column": None}
        pictures.unlabeled = {"dataset": placed(labels.unlabeled_dataset), "split": labels.unlabeled_split}
        other = whole_of(load_source(labels.unlabeled_dataset, labels.unlabeled_split, **own), "train")
        pictures.train = replace(free(pictures.division.held, other, said), channels=source.channels)
