"""``hf_ssl.fit``: labelled and unlabelled images in, a classifier and a report out, in one call."""

import logging
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..data.labels import LabeledImages, LabeledRows, draw_labeled
from ..data.sources import load_source
from ..data.splits import marked, without
from ..methods import family_of, load
from ..processing import SSLImageProcessor
from .arguments import ModelArguments, SSLTrainingArguments
from .build import build_method, default_arguments
from .levels import merge
from .publish import published_facts
from .trainer import SSLTrainer

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("hf_ssl.training")

_SHOWN = ("accuracy", "macro_f1", "ece")


@dataclass
class FitReport:
    """What ``fit`` returns.

    model: the native classifier that is evaluated and published, class names in its config: the EMA weights, or the
    last ones where they are better on the validation images, or the EMA is still the random start (``run`` says which
    and why); processor: its native image processor. validation: accuracy, macro_f1, ece of ``model``, student_accuracy
    of the last weights and, where those are ``model``, average_accuracy of the EMA; empty without validation images.
    history: what was logged, a dict per entry. labeled: the rows whose labels were used. skipped: "file or row:
    reason" of each image left out. method, views: the whole method and its view recipe, to go on training.
    """

    model: PreTrainedModel
    processor: Any
    validation: dict[str, Any]
    history: list[dict[str, Any]]
    labeled: LabeledRows
    method: Any = field(repr=False)
    views: SSLImageProcessor = field(repr=False)
    skipped: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict, repr=False)

    def save(self, path: str | Path) -> None:
        """Write a folder that plain ``AutoModelForImageClassification`` loads; its ssl/ holds the method."""
        from ..hub import export

        export(self.method, self.views, path, self.run)

    def pseudo_labels(self, images: Any, threshold: float = 0.0, **options: Any) -> "Dataset":
        """Image, label, confidence and weight of every image, for a loop of your own; see ``hf_ssl.pseudo_label``."""
        from ..evaluation import pseudo_label

        return pseudo_label(self.model, images, self.processor, threshold=threshold, **options)

    def __str__(self) -> str:
        from ..evaluation import format_table

        figures = {name: self.validation[name] for name in _SHOWN if name in self.validation}
        last = "average_accuracy" in self.validation
        names = ("last (report.model)", "EMA") if last else ("EMA (report.model)", "last")
        rows = [{"weights": names[0], **figures}]
        if "student_accuracy" in self.validation:
            other = self.validation["average_accuracy" if last else "student_accuracy"]
            rows.append({"weights": names[1], "accuracy": other})
        labels = f"{len(self.labeled.rows)} labels of {len(self.labeled.names)} classes ({self.labeled.rule})"
        return f"{self.method.paper.name} on {labels}\n\n{format_table(rows)}" if figures else labels


def fit(
    model: str | Path | PreTrainedModel,
    labeled: Any,
    unlabeled: Any = None,
    validation: Any = None,
    *,
    method: str = "fixmatch",
    output_dir: str | Path | None = None,
    label_column: str | None = None,
    labels_per_class: int | None = None,
    label_fraction: float | None = None,
    label_ids: Any = None,
    unlabeled_ratio: int = 7,
    image_size: int | None = None,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    views: dict[str, Any] | None = None,
    **training: Any,
) -> FitReport:
    """Train a semi-supervised method on labelled and unlabelled images and report on validation images.

    model: a preset (``resnet-18``, ``vit-small``, ...), a folder or Hub id of a native backbone or classifier to start
        from, an export of ours included, or such a model itself (it is copied, not changed).
    labeled, unlabeled, validation: what ``load_source`` reads (a ``datasets`` dataset, a list of images or rows, a
        folder, a Hub id, ...). Of ``labeled`` every row that has a label is used, or as many as labels_per_class,
        label_fraction or label_ids (row numbers or a file of them) say, drawn once from ``seed``. ``unlabeled``: by
        default all images of ``labeled``; its labels are never trained on. ``validation`` is only measured on: a
        picture of it that is also among the others, byte for byte, is not trained on, and a log line says so.
    output_dir: where checkpoints go; None keeps none. ``resume_from_checkpoint=True`` goes on from the last one there.
    config, views: fields of the method's config and of its image processor. training: any training argument, such as
        max_steps, per_device_train_batch_size, learning_rate; the paper's otherwise.

    Raises ValueError (``SourceError``) saying what is wrong with the data, the model or an argument.
    """
    if load(method).reads != "labels":
        family = family_of(method)
        raise ValueError(f"fit trains semi-supervised methods; {method} is one of {family}: use SSLTrainer or hf-ssl")
    source, held = load_source(labeled, label_column=label_column), None
    if validation is not None:
        held = marked(load_source(validation, label_column=label_column, channels=source.channels), "validation")
    said: list[str] = []
    source = source if held is None else without(source, held, said)
    chosen, rows = draw_labeled(source, label_column, labels_per_class, label_fraction, label_ids, seed)
    images = source if unlabeled is None else load_source(unlabeled, channels=source.channels)
    images = images if held is None or unlabeled is None else without(images, held, said)
    for sentence in said:
        logger.warning("%s", sentence)
    with ExitStack() as stack:
        if output_dir is None:
            output_dir = stack.enter_context(tempfile.TemporaryDirectory())
            training.setdefault("save_strategy", "no")
        if isinstance(model, PreTrainedModel):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            model.save_pretrained(folder)
            model = folder
        settings = merge({"logging_steps": 50, "seed": seed, **default_arguments(method)}, training)
        arguments = SSLTrainingArguments(str(output_dir), **settings)
        whole, processor = build_method(
            method, images, ModelArguments(backbone=str(model), image_size=image_size), config, views, seed, rows.names
        )
        trainer = SSLTrainer(
            whole, arguments, images, processor, source if held is not None else None, held,
            labeled=LabeledImages(chosen, rows, unlabeled_ratio),
        )  # fmt: skip
        trainer.train(arguments.resume_from_checkpoint)
        arguments.eval_images = 0  # all of them, now that it is the final figure
        measured = trainer.evaluate() if held is not None else {}
        skipped = trainer.skipped_images()["names"]
    division: dict[str, Any] = {
        "train": images.num_rows,
        "validation": 0 if held is None else held.num_rows,
        "test": 0,
    }
    division["rule"] = " ".join([*said, "Training, with labels or without, left out what is validated on."])
    results = {name.removeprefix("eval_"): value for name, value in measured.items()}
    published = published_facts(whole)
    if published["published"]["weights"] == "last" and held is not None:  # the model's figures are the last weights'
        averaged = {f"average_{name}": results[name] for name in _SHOWN}
        results |= averaged | {name: results[f"student_{name}"] for name in _SHOWN}
    return FitReport(
        whole.export_backbone.eval().cpu(), processor.native_processor(), results, trainer.state.log_history, rows,
        whole, processor, skipped,
        {"method": method, "dataset": source.name, "labeled": rows.to_dict(), "division": division, **published},
    )  # fmt: skip
