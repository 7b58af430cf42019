"""Labels of some images: a native classifier is trained beside images without labels, and is measured by accuracy."""

from dataclasses import dataclass, field, replace
from typing import Any

from ... import limits
from ...data.labels import LabeledImages, draw_labeled, label_names
from ...data.same import placed
from ...data.sources import ImageSource, load_source
from ...data.splits import Division, free, whole_of
from ...modeling import SSLModel
from ...processing import SSLImageProcessor
from ..arguments import DataArguments
from ..build import Request, on_a_backbone
from . import Kind, Sources


@dataclass
class LabelArguments:
    """Of semi-supervised methods: the labels of ``dataset`` that are used (default: all), the images beside them."""

    labels_per_class: int | None = field(
        default=None, metadata={"help": "Use the labels of so many images of each class, drawn once from the seed."}
    )
    label_fraction: float | None = field(
        default=None, metadata={"help": "Use the labels of this share of the images, balanced as the classes are."}
    )
    label_ids: str | None = field(
        default=None, metadata={"help": "Use the labels of these rows: a file with one row number per line, or JSON."}
    )
    label_seed: int | None = field(default=None, metadata={"help": "Seed of that draw; default: the run's seed."})
    unlabeled_dataset: str | None = field(
        default=None, metadata={"help": "Images without labels; default: all images of dataset that train."}
    )
    unlabeled_split: str = field(default="train", metadata={"help": "Split of unlabeled_dataset."})
    unlabeled_ratio: int = field(
        default=7, metadata={"help": "Unlabelled images per labelled one in a batch (μ); 0 trains on labels alone."}
    )
    limits = {"labels_per_class": "[1, inf)", "label_fraction": "[0, 1]", "label_seed": "[0, 4294967295]"}

    def __post_init__(self) -> None:
        limits.check(self)


class Labels(Kind):
    arguments = LabelArguments
    has_classes = True
    has_bank = False

    def sources(
        self,
        division: Division,
        data: DataArguments,
        kind_args: LabelArguments,
        seed: int,
        options: dict[str, Any],
        said: list[str],
    ) -> Sources:
        """The labelled rows of the training source, chosen once, and what remains to train on beside them."""
        rule = (kind_args.labels_per_class, kind_args.label_fraction, kind_args.label_ids)
        seed = seed if kind_args.label_seed is None else kind_args.label_seed
        chosen, rows = draw_labeled(division.train, data.label_column, *rule, seed)
        found = Sources(division.train, LabeledImages(chosen, rows, kind_args.unlabeled_ratio))
        if kind_args.unlabeled_dataset:
            options = {**options, "label_column": None, "image_column": None}
            found.unlabeled = {"dataset": placed(kind_args.unlabeled_dataset), "split": kind_args.unlabeled_split}
            other = whole_of(load_source(kind_args.unlabeled_dataset, kind_args.unlabeled_split, **options), "train")
            found.train = replace(free(division.held, other, said), channels=division.train.channels)
        return found

    def labeled(self, model: SSLModel, images: ImageSource, seed: int) -> LabeledImages:
        """Every labelled row of ``images``.

        ValueError where its classes are not those of the model, by name and order; SourceError without labels.
        """
        source, rows = draw_labeled(images, seed=seed)
        classes = tuple(str(name) for name in model.backbone.config.id2label.values())
        if rows.names != classes:
            raise ValueError(
                f"the labels of {images.name} are {', '.join(rows.names[:8])} and the model's classes are "
                f"{', '.join(classes[:8])}: build the model with build_method on the same images, or give its classes "
                "as class_names"
            )
        return LabeledImages(source, rows)

    def build(self, request: Request) -> tuple[SSLModel, SSLImageProcessor]:
        names = label_names(request.source) if request.class_names is None else request.class_names
        return on_a_backbone(request, names)

    def measure(
        self,
        method: Any,
        views: SSLImageProcessor,
        bank: ImageSource,
        queries: ImageSource,
        options: dict[str, Any],
    ) -> dict[str, float]:
        """accuracy, macro_f1 and ece of the EMA weights, student_accuracy, ... of the last ones."""
        from ...evaluation import classification_report, predict

        processor = views.eval_processor()
        reports = []
        for model in (method.ema, method.backbone):
            found = predict(model, queries, processor, **options)
            reports.append(classification_report(found.probabilities, found.labels, found.names))
        averaged, last = reports
        return {
            **{name: averaged[name] for name in ("accuracy", "macro_f1", "ece")},
            **{f"student_{name}": last[name] for name in ("accuracy", "macro_f1", "ece")},
        }
