"""One call from a model to the table: its baselines and the model itself, side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_ssl.backbones import model_kind
from hf_ssl.data.classes import in_order, matching_column, task_labels
from hf_ssl.data.sources import ImageSource, load_source
from hf_ssl.evaluation.classification import (
    LabelMismatchError,
    classification_report,
    few,
    majority_class,
    predict,
)
from hf_ssl.evaluation.features import Features, extract_features, raw_pixels, untrained
from hf_ssl.evaluation.health import feature_std, rankme
from hf_ssl.evaluation.knn import knn_accuracy, retrieval_recall
from hf_ssl.evaluation.linear import linear_probe
from hf_ssl.evaluation.low_shot import low_shot
from hf_ssl.evaluation.natives import load_native
from hf_ssl.evaluation.prompts import Prompts
from hf_ssl.evaluation.segmentation import NoAttentionError, NoMaskError, attention_segmentation
from hf_ssl.evaluation.zero_shot import class_list, classify, retrieve, zero_shot_accuracy
from hf_ssl.untouched import untouched

logger = logging.getLogger(__name__)

MEASURES = (
    "knn", "linear", "retrieval", "segmentation", "health", "low_shot", "classification", "zero_shot",
    "text_retrieval",
)  # fmt: skip
_OF_FEATURES = {"knn", "linear", "low_shot", "retrieval", "health"}  # what raw pixels can be measured by as well
_OF_BANK = {"knn", "linear", "low_shot", "health"}
_OF_TEXTS = {"zero_shot", "text_retrieval"}
_NATURAL = {
    "backbone": ("knn", "linear", "retrieval", "health"),
    "classifier": ("classification", "knn", "linear", "health"),
    "image_text": ("zero_shot", "text_retrieval", "knn", "health"),
}
PROTOCOL_NAMES = {"emoji": "centred", "emoji:placed": "placed"}


@dataclass(frozen=True)
class Pairing:
    """Cross-style retrieval: a row with `side` == query looks for its own `item` among those == gallery."""

    item: str
    side: str
    query: object
    gallery: object


EMOJI_PAIRING = Pairing(item="code_point", side="style", query="google", gallery="twitter")


def natural_measures(model) -> tuple[str, ...]:
    """What a model (an instance, a folder or a Hub id) is first of all measured by, from what it is."""
    return _NATURAL[model_kind(model)]


@untouched()
def evaluate_backbone(
    model,
    processor,
    train_source: Any,
    test_source: Any,
    labels: Sequence[str] | None = None,
    measures: Sequence[str] = ("knn", "linear", "retrieval", "health"),
    baselines: bool = True,
    protocol: str | None = None,
    k: Sequence[int] = (20, 200),
    solver: str = "lbfgs",
    pairing: Pairing | None = EMOJI_PAIRING,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    progress: bool = True,
    max_images: int | None = None,
    seed: int = 0,
    prompts: Prompts | None = None,
    name: str = "trained",
    others: Mapping[str, torch.nn.Module] | None = None,
    knn_precision: str = "fp32",
) -> list[dict]:
    """Rows {"protocol", "model", "knn20_<label>", ..., "linear_<label>", "r1", "r5", "jaccard_best", "std", "rankme",
    "lowshot1_<label>", "accuracy", "top5", "macro_f1", "ece", "zeroshot_<label>", "i2t_r1", "t2i_r1", ...}.

    `model`: any native vision model, classifier or image-text model; `processor`: as in `load_native`; `batch_size`,
    `device`, `num_workers`, `max_images`: as in `extract_features`. `labels`: columns to predict (default: the train
    source's). Train is the bank and the probe's data, test is only scored. `measures`: any of MEASURES. `baselines`:
    rows come first for what needs no training: the commonest class, chance, raw pixels (32 x 32), the untrained twin
    (`seed`). `protocol`: the rows' name (default: "centred" / "placed" for emoji, else the source's name). `pairing`:
    which test rows search which; skipped where the columns are absent. `prompts`: see `zero_shot`. `name`: of the
    model's own row; `others`: further classifiers with the same processor, measured as such. `knn_precision`: see
    `nearest`; another than "fp32" is named in each row of features as "knn_precision". A classifier's row also
    holds "classes", "per_class_recall", "confusion" and "calibration". What cannot be measured is left out of the row
    and said once in the log. Raises ValueError for an unknown measure or label, and for classes that do not match.
    """
    train_source, test_source = load_source(train_source), load_source(test_source)
    unknown = [measure for measure in measures if measure not in MEASURES]
    if unknown:
        raise ValueError(f"Unknown measure {unknown[0]!r}: choose among {', '.join(MEASURES)}.")
    model, processor, kind = load_native(model, processor, device)
    measures = _possible(measures, kind, test_source)
    labels = tuple(train_source.labels if labels is None else labels)
    bench = _Bench(
        processor, train_source, test_source, labels, measures, tuple(k), solver, pairing, seed, prompts,
        {"batch_size": batch_size, "num_workers": num_workers, "progress": progress, "max_images": max_images,
         "device": device},
        knn_precision,
    )  # fmt: skip
    own = (bench.classified(model) if "classification" in measures else {}) | bench.row(model)
    rows: dict[str, dict[str, Any]] = {}
    if baselines:
        rows |= {"majority class": bench.majority, "chance": bench.chance}
        rows["raw pixels"] = bench.row(None)
        if set(measures) - {"classification"}:
            rows["untrained"] = bench.row(untrained(model, seed).to(next(model.parameters()).device))
    if "classification" in measures:
        rows |= {other: bench.classified(found) for other, found in (others or {}).items()}
    rows[name] = own
    protocol = protocol or PROTOCOL_NAMES.get(test_source.name, test_source.name)
    return [{"protocol": protocol, "model": n, **row} for n, row in rows.items() if row or n == name]


def _possible(measures: Sequence[str], kind: str, source: ImageSource) -> tuple[str, ...]:
    """`measures` without those that this kind of model or source cannot be measured by, which are logged."""
    reasons = {}
    if kind != "classifier":
        reasons["classification"] = "the model has no classifier head"
    if kind != "image_text":
        reasons |= dict.fromkeys(_OF_TEXTS, "the model has no text tower")
    else:
        if not source.labels:
            reasons["zero_shot"] = f"{source.name} has no labels"
        if not getattr(source, "has_captions", False):
            reasons["text_retrieval"] = f"{source.name} has no texts"
    for measure in measures:
        if measure in reasons:
            logger.warning("Not measured: %s, because %s.", measure, reasons[measure])
    return tuple(measure for measure in measures if measure not in reasons)


@dataclass
class _Bench:
    """What all rows of one table are measured with."""

    processor: Any
    train: ImageSource
    test: ImageSource
    labels: tuple[str, ...]
    measures: tuple[str, ...]
    k: tuple[int, ...]
    solver: str
    pairing: Pairing | None
    seed: int
    prompts: Prompts | None
    loading: dict[str, Any]
    knn_precision: str = "fp32"

    def __post_init__(self) -> None:
        # known after the model's own row: what always naming the commonest class scores, and a blind search
        self.majority: dict[str, float] = {}
        self.chance: dict[str, float] = {}

    def row(self, model: torch.nn.Module | None) -> dict[str, Any]:
        """Every measure but classification; `model` None = raw pixels."""
        wanted = set(self.measures) & _OF_FEATURES
        if model is None:
            wanted -= {"health"}  # pixels cannot collapse
        texts = set(self.measures) & _OF_TEXTS if model is not None else set()
        row: dict[str, Any] = {}
        if wanted or texts:
            test = self._features(model, self.test, "text_retrieval" in texts)
            train = self._features(model, self.train) if wanted & _OF_BANK else test
            row |= self._of_texts(model, test, texts)
            row |= measure_features(
                train, test, self.labels, tuple(wanted), self.k, self.solver, self.pairing, self.seed,
                self.knn_precision,
            )  # fmt: skip
        if "segmentation" in self.measures and model is not None:
            row |= self._segmentation(model)
        return row

    def _features(self, model: torch.nn.Module | None, source: ImageSource, captions: bool = False) -> Features:
        pair_columns = (self.pairing.item, self.pairing.side) if self.pairing else ()
        loading = {**self.loading, "columns": (*self.labels, *pair_columns)}
        if model is None:
            found = raw_pixels(source, **{key: value for key, value in loading.items() if key != "device"})
            return with_columns(found, source, [label for label in self.labels if label in self.train.labels])
        found = extract_features(model, source, self.processor, captions=captions, **loading)
        return with_columns(found, source, [label for label in self.labels if label in self.train.labels])

    def _of_texts(self, model: Any, test: Features, measures: set[str]) -> dict[str, float]:
        row: dict[str, float] = {}
        if "zero_shot" in measures:
            for label in self.labels:
                more = class_list(self.train, label) if label in self.train.labels else ()
                found = classify(model, self.processor, self.test, test, label, self._prompts(label), more)
                scores = zero_shot_accuracy(found)
                row[f"zeroshot_{label}"] = scores["top1"]
                row |= {f"zeroshot5_{label}": scores["top5"]} if "top5" in scores else {}
                self.majority[f"zeroshot_{label}"] = scores["majority"]
        if "text_retrieval" in measures:
            recall = retrieve(model, self.processor, test)
            names = [key for key in recall if f"{key}_chance" in recall]
            row |= {key: recall[key] for key in names}
            self.chance = {key: recall[f"{key}_chance"] for key in names}
        return row

    def _prompts(self, label: str) -> Prompts | None:
        """The prompts for `label`; those whose classes are another label column's keep only their templates."""
        if self.prompts is None or not self.prompts.classes:
            return self.prompts
        own = {name: set(class_list(self.test, name)) for name in self.labels if not self.test.is_stream}
        described = set(self.prompts.classes)
        if own.get(label) != described and described in own.values():
            return Prompts(self.prompts.templates)
        return self.prompts

    def classified(self, model: Any) -> dict[str, Any]:
        """The row of a classifier on the test pictures."""
        found = predict(model, self.test, self.processor, self._class_label(), **self.loading)
        report = classification_report(found.probabilities, found.labels, found.names)
        self.majority["accuracy"] = majority_class(found.labels)
        return {**{key: value for key, value in report.items() if key != "samples"}, "classes": list(found.names)}

    def _class_label(self) -> str | None:
        return self.labels[0] if len(self.labels) == 1 else None

    def _segmentation(self, model: Any) -> dict[str, float]:
        options = {key: self.loading[key] for key in ("device", "progress", "max_images")}
        try:
            found = attention_segmentation(model, self.test, self.processor, **options)
        except (NoAttentionError, NoMaskError) as error:
            logger.warning("%s", error)
            return {}
        return {"jaccard_best": found["jaccard_best"], "jaccard_mean": found["jaccard_mean"]}


def with_columns(found: Features, source: ImageSource, labels: Sequence[str]) -> Features:
    """`found` with each of `labels`: a source whose only label column has another name is known by that one."""
    for label in labels:
        own = matching_column(source.labels, label)
        if own is not None and own != label:
            found.labels[label] = found.labels[own]
            found.classes |= {label: found.classes[own]} if own in found.classes else {}
    return found


def measure_features(
    train: Features,
    test: Features,
    labels: Sequence[str],
    measures: Sequence[str] = ("knn", "linear", "retrieval", "health"),
    k: Sequence[int] = (20, 200),
    solver: str = "lbfgs",
    pairing: Pairing | None = EMOJI_PAIRING,
    seed: int = 0,
    knn_precision: str = "fp32",
) -> dict[str, Any]:
    """The figures of one row of `evaluate_backbone`, from features already extracted."""
    row: dict[str, Any] = {}
    for label in labels if {"knn", "linear", "low_shot"} & set(measures) else ():
        fit, score = _labelled(train, test, label)
        data = (fit.embeddings, fit.labels[label], score.embeddings, score.labels[label])
        if "knn" in measures:
            accuracy = knn_accuracy(*data, k=k, precision=knn_precision)
            row |= {f"knn{n}_{label}": accuracy[f"knn{n}_top1"] for n in k}
            row |= {} if knn_precision == "fp32" else {"knn_precision": knn_precision}
        if "linear" in measures:
            groups = fit.labels.get(pairing.item) if pairing else None
            groups = None if groups is None or None in groups else groups
            row[f"linear_{label}"] = float(linear_probe(*data, solver=solver, groups=groups, seed=seed)["top1"])
        if "low_shot" in measures:
            row |= {f"{key}_{label}": value for key, value in low_shot(*data, seed=seed).items()}
    if "retrieval" in measures and pairing:
        row |= _retrieval(test, pairing)
    if "health" in measures:
        row |= {"std": feature_std(train.embeddings), "rankme": rankme(train.embeddings)}
    return row


def _labelled(train: Features, test: Features, label: str) -> tuple[Features, Features]:
    """The rows of both sides that carry `label`, now by name: classes of one task, however each side numbers them."""
    sides = (train, test)
    values = [side.labels.get(label) or [] for side in sides]
    names = task_labels(values[0], train.classes.get(label), values[1], test.classes.get(label))
    found = []
    for side, own in zip(sides, names, strict=True):
        keep = [i for i, name in enumerate(own) if name is not None]
        if not keep:
            raise ValueError(
                f"No row has a {label!r} label; the columns at hand are {', '.join(side.labels) or 'none'}."
            )
        named = replace(side, labels={**side.labels, label: own}, classes={})
        found.append(named if len(keep) == len(side) else named.select(keep))
    bank, queries = (set(side.labels[label]) for side in found)
    if not bank & queries:
        raise LabelMismatchError(
            f"The two sides have no class of {label!r} in common: the bank has {few(in_order(bank))}, "
            f"the queries have {few(in_order(queries))}."
        )
    return found[0], found[1]


def _retrieval(test: Features, pairing: Pairing) -> dict[str, float]:
    items, sides = test.labels.get(pairing.item), test.labels.get(pairing.side)
    if items is None or sides is None:
        return {}
    query = test.select([i for i, side in enumerate(sides) if side == pairing.query])
    gallery = test.select([i for i, side in enumerate(sides) if side == pairing.gallery])
    if not len(query) or not len(gallery):
        return {}
    return retrieval_recall(
        query.embeddings, gallery.embeddings, query.labels[pairing.item], gallery.labels[pairing.item]
    )
