"""What a run trains on and what it is measured on, from a plan's data and label flags."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import tables
from .console import CommandError
from .fields import paper
from .plan import Plan

if TYPE_CHECKING:
    from ..data.labels import LabeledRows
    from ..data.sources import ImageSource
    from ..training.arguments import DataArguments


@dataclass
class Pictures:
    """The sources of a run."""

    train: ImageSource  # for a semi-supervised method: the images without labels
    pairs: list[tables.Pair]  # of the final table
    online: tuple[ImageSource | None, ImageSource | None] = (None, None)  # bank and queries while training
    labeled: ImageSource | None = None
    labeled_rows: LabeledRows | None = None
    unlabeled_ratio: int = 0


def load_pictures(plan: Plan) -> Pictures:
    """The training source and, where there are labels, bank and queries of each protocol. Decodes nothing."""
    from ..data.sources import load_source
    from ..training.arguments import DataArguments

    data = DataArguments(**plan.group("data"))
    family = paper(plan.method)["family"]
    columns: dict[str, Any] = {"image_column": data.image_column, "label_column": data.label_column}
    if family == "image_text":
        columns["caption_column"] = plan.group("text").get("caption_column")
    options = {**columns, "streaming": data.streaming}
    source = load_source(data.dataset, data.split, **options)
    validation = _validation(data, options)
    if data.validation_fraction is not None:
        divided = tables.held_out(source, data.validation_fraction, "to validate on")
        if divided is None:
            raise CommandError("--validation_fraction divides a set whose rows can be counted: drop --streaming.")
        source, validation = divided
    evaluates = plan.values.get("eval_strategy", "no") != "no"
    explicit = "eval_split" in plan.values
    specs = (data.eval_dataset,) if data.eval_dataset else tables.protocols(data.dataset)
    wanted = not plan.own["no_evaluation"] or evaluates
    found = (
        tables.labelled_pair(spec, data.split, data.eval_split, explicit, family == "image_text", **options)
        for spec in specs
        if wanted
    )
    pairs = [pair for pair in found if pair is not None]
    pairs.sort(key=lambda pair: pair[0].name != data.dataset)
    online: tuple[Any, Any] = pairs[0] if pairs else (None, None)
    if validation is not None:
        online = (source, validation)
    if evaluates and online == (None, None):
        raise CommandError(f"eval_strategy needs labelled images, and {data.dataset} has none; give --eval_dataset.")
    pictures = Pictures(source, pairs, online)
    if family == "semi_supervised":
        _draw_labels(pictures, plan, data, options)
    return pictures


def _validation(data: DataArguments, options: dict[str, Any]) -> ImageSource | None:
    from ..data.sources import load_source

    if data.validation_split is None:
        return None
    if data.validation_fraction is not None:
        raise CommandError("Give --validation_split or --validation_fraction, not both.")
    return load_source(data.eval_dataset or data.dataset, data.validation_split, **options)


def _draw_labels(pictures: Pictures, plan: Plan, data: DataArguments, options: dict[str, Any]) -> None:
    """Choose the labelled rows of the training source; what remains to train on beside them follows."""
    from transformers import TrainingArguments

    from ..data.labels import draw_labeled
    from ..data.sources import load_source
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
        other = load_source(labels.unlabeled_dataset, labels.unlabeled_split, **own)
        pictures.train = replace(other, channels=source.channels)
