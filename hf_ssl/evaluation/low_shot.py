"""Low-shot: what frozen features are worth when one label in a hundred, or in ten, is known."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.evaluation.knn import as_features, encode_labels, labelled
from hf_ssl.evaluation.linear import LBFGSProbe

STRENGTH = 0.0025  # MSN's L2 (arXiv 2204.07141): nothing is tuned, for a few labels leave nothing to tune on


def low_shot(
    train_features: Tensor,
    train_labels: Sequence[Hashable] | Tensor,
    test_features: Tensor,
    test_labels: Sequence[Hashable] | Tensor,
    fractions: Sequence[float] = (0.01, 0.1),
    draws: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """Test accuracy of a logistic regression on a share of the train labels, mean over `draws` random subsets.

    Features train (N, D), test (M, D), less the mean of the drawn rows, each of length 1; mean cross-entropy +
    0.0025/2 ||W||^2 by L-BFGS. A draw takes its fraction of every class, at least one row. Labels are names or
    numbers; a test label unknown to train is wrong, and rows without one (None, NaN, -1, "") are as if they were not
    there. Returns {"lowshot1": accuracy with 1 %, "lowshot10": with 10 %, ...}.
    Raises ValueError for sizes that do not match, fewer than two classes, or a fraction outside (0, 1].
    """
    x, x_test = as_features(train_features, "train_features"), as_features(test_features, "test_features")
    if len(train_labels) != len(x) or len(test_labels) != len(x_test):
        raise ValueError(
            f"{len(x)} train and {len(x_test)} test features came with {len(train_labels)} and {len(test_labels)} "
            "labels."
        )
    if draws < 1 or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"low_shot needs at least 1 draw and fractions in (0, 1], got {draws} and {fractions}.")
    x, train_labels, _ = labelled(x, train_labels, "train_features")
    x_test, test_labels, _ = labelled(x_test, test_labels, "test_features")
    y, y_test, classes = encode_labels(train_labels, test_labels)
    if len(classes) < 2:
        raise ValueError(f"Low-shot needs at least 2 classes in train, got {classes}.")
    result = {}
    for fraction in fractions:
        scores = []
        for draw in range(draws):
            rows = stratified_rows(y, fraction, seed + draw).to(x.device)
            scores.append(_fit_and_score(x[rows], y[rows.cpu()], x_test, y_test, len(classes)))
        result[f"lowshot{100 * fraction:g}"] = sum(scores) / draws
    return result


def stratified_rows(y: Tensor, fraction: float, seed: int) -> Tensor:
    """Sorted rows of a random `fraction` of every class of `y` (N,), rounded, at least one each."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in y.unique().tolist():
        rows = order[y[order] == label]
        chosen.append(rows[: max(1, round(fraction * len(rows)))])
    return torch.cat(chosen).sort().values


def _fit_and_score(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, classes: int) -> float:
    mean = x.mean(dim=0)
    x, x_test = F.normalize(x - mean, dim=1), F.normalize(x_test - mean, dim=1)
    (weight,) = LBFGSProbe(classes, 100).fit(x, y, (STRENGTH,))
    guess = (x_test @ weight[:-1] + weight[-1]).cpu().argmax(dim=1)
    return (guess == y_test).double().mean().item()
