"""A run's table of figures as the Hub's ``model-index``: every figure with its dataset, split and baselines."""

import re
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.report_table import OWN_ROWS, heading, is_number, is_quality

_TASKS = (  # what a column's name starts with -> the Hub's task and metric
    (("knn", "linear", "lowshot", "accuracy", "top"), "image-classification", "accuracy"),
    (("macro_f1",), "image-classification", "f1"),
    (("zeroshot",), "zero-shot-image-classification", "accuracy"),
    (("i2t_", "t2i_", "r"), "image-feature-extraction", "recall"),
    (("jaccard",), "image-segmentation", "jaccard"),
)


def is_hub_id(name: Any) -> bool:
    """Whether `name` can be a repo: two words and a slash, and nothing of that name on this disk."""
    from pathlib import Path

    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def eval_results(run: dict[str, Any]) -> list[EvalResult]:
    """The trained model's figures; those of raw pixels, the untrained twin, chance are each figure's ``baselines``.

    [] where pictures that are measured on were trained on: such figures are not results.
    """
    if (run.get("division") or {}).get("trained_on"):
        return []
    rows = [row for row in run.get("results") or [] if isinstance(row, dict)]
    found = []
    for own in (row for row in rows if row.get("model") in OWN_ROWS):
        others = [row for row in rows if row.get("protocol") == own.get("protocol") and row is not own]
        name, kind, split = evaluated_on(run, own.get("protocol"))
        for key, value in own.items():
            if not (is_quality(key) and is_number(value)):
                continue
            task, metric = next((t, m) for prefixes, t, m in _TASKS if key.startswith(prefixes))
            beside = {str(row.get("model")): round(row[key], 4) for row in others if is_number(row.get(key))}
            found.append(
                EvalResult(
                    task, kind, name, metric, round(float(value), 4), dataset_split=split, metric_name=heading(key),
                    metric_args={"baselines": beside} if beside else None,
                )
            )  # fmt: skip
    return found


def evaluated_on(run: dict[str, Any], protocol: Any) -> tuple[str, str, str | None]:
    """(name, Hub id or kind, split) of the pictures that a protocol's rows were measured on."""
    source: dict[str, Any] = (run.get("evaluated_on") or {}).get(protocol) or {}
    dataset = source.get("dataset") or protocol or run.get("dataset") or "unnamed"
    repo = str(dataset).partition(":")[0]
    shown = PurePath(str(dataset)).name if PurePath(str(dataset)).is_absolute() else str(dataset)
    name = shown if protocol in (None, dataset) or is_hub_id(repo) else f"{shown} ({protocol})"
    kind = repo if is_hub_id(repo) else re.sub(r"[^a-z0-9]+", "-", shown.lower()).strip("-") or "images"
    return name, kind, source.get("split")
