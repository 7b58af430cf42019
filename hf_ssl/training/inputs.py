"""What ``SSLTrainer`` is handed, checked and turned into sources: any images, by Trainer's names or by its own."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor

from ..data.sources import ImageSource, load_source
from ..data.splits import for_testing
from ..modeling import SSLModel
from .arguments import SSLTrainingArguments

_ORDER = "the order is SSLTrainer(model, args, images, processing_class)"
_NO_PREDICTIONS = (
    "evaluate() measures kNN, accuracy or retrieval itself and hands out no predictions. Read its figures in a "
    "TrainerCallback's on_evaluate, override SSLTrainer.evaluate, or take features with extract_features"
)
_REFUSED = {  # arguments of Trainer that a method has no use for -> what to do instead
    "data_collator": "the batches are drawn by processing_class, the method's image processor: change its fields",
    "model_init": "pass the model itself, and make another SSLTrainer for another trial",
    "compute_loss_func": "the loss is what the method's forward returns: subclass the method to change it",
    "compute_metrics": _NO_PREDICTIONS,
    "preprocess_logits_for_metrics": _NO_PREDICTIONS,
}


def check_arguments(model: Any, args: Any, processor: Any, others: Mapping[str, Any]) -> None:
    """TypeError where an argument is another's or one that SSLTrainer has no use for; says which and what to do."""
    for name, why in _REFUSED.items():
        if others.get(name) is not None:
            raise TypeError(f"SSLTrainer takes no {name}: {why}.")
    if isinstance(model, TrainingArguments) or isinstance(args, SSLModel):
        raise TypeError(f"model and args stand in each other's place: {_ORDER}.")
    if not hasattr(model, "lr_scaling"):  # a wrapper such as peft's hands the method's attributes on
        raise TypeError(
            f"SSLTrainer trains a method of hf_ssl, and model is a {type(model).__name__}: "
            "build_method(name, images, ModelArguments(backbone=...)) makes one of a native backbone."
        )
    if not isinstance(args, SSLTrainingArguments):
        raise TypeError(
            f"args is a {type(args).__name__}: give SSLTrainingArguments(output_dir, ...), which extends it."
        )
    optimiser = others.get("optimizer_cls_and_kwargs") or next(iter(others.get("optimizers") or ()), None)
    if optimiser is not None and args.own_optimiser:
        raise TypeError(
            f"An optimiser is given, and optim={args.own_optimiser!r} names another: leave one of them out."
        )
    if not hasattr(processor, "draw"):
        raise TypeError(
            f"processing_class is a {type(processor).__name__}: give the method's image processor, which build_method "
            f"returns beside the model; {_ORDER}."
        )
    if not processor.num_views:
        raise ValueError("The processor draws no view of a picture: count must be 1 or more in one of its groups.")


def check_choice(args: SSLTrainingArguments, sources: list[ImageSource]) -> None:
    """ValueError where the best checkpoint would be chosen on images that are there to test on."""
    tests = [source.split for source in sources if for_testing(source)]
    if args.load_best_model_at_end and tests:
        raise ValueError(
            f"load_best_model_at_end would choose the checkpoint on the {tests[0]} images; choose on "
            "others: --validation_split, or --validation_fraction of the training images"
        )


def one_of(own: Any, theirs: Any, names: tuple[str, str]) -> Any:
    """The one that is given of an argument with two names. TypeError: both are."""
    if own is not None and theirs is not None:
        raise TypeError(f"{names[0]} and {names[1]} are two names of one argument: give one of them.")
    return theirs if own is None else own


def training_images(data: Any, processor: Any) -> ImageSource:
    """The source of what is given to train on, in the processor's channels; TypeError: nothing or no images."""
    if data is None:
        raise TypeError("SSLTrainer needs images to train on: train_dataset, anything that load_source reads.")
    if isinstance(data, (BaseImageProcessor, SSLModel, TrainingArguments)):
        raise TypeError(f"A {type(data).__name__} stands where the images belong: {_ORDER}.")
    return load_source(data).with_channels(getattr(processor, "num_channels", 0))


def measured_images(data: Any, train: ImageSource) -> Any:
    """The source, or {name: source}, of what is given to measure on; with the channels of the training images."""
    if data is None:
        return None
    if isinstance(data, Mapping):
        return {str(name): measured_images(part, train) for name, part in data.items()}
    return load_source(data).with_channels(train.channels)


def each(sources: Any) -> list[ImageSource]:
    """The sources of what ``measured_images`` returned."""
    return list(sources.values()) if isinstance(sources, dict) else [] if sources is None else [sources]
