"""Is the representation alive? Spread, effective rank, alignment, uniformity, teacher entropy; and what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.evaluation.knn import as_features

# Below these a run is called collapsed / at risk. std is a share of the healthy 1/sqrt(d), rank a share of d.
COLLAPSED_STD, LOW_STD = 0.02, 0.2
COLLAPSED_RANK, LOW_RANK = 1.5, 0.05
UNIFORM_ENTROPY = 0.98  # share of log K above which each teacher answer is indistinguishable from uniform
ONE_ANSWER_ENTROPY = 0.05  # share of log K below which the averaged answer names one output only


def feature_std(features: Tensor) -> float:
    """Mean over the D channels of each channel's standard deviation over the N samples, of L2-normalised features (N,
    D).

    1/sqrt(D) for directions spread evenly over the sphere, 0 when all samples share one direction.
    """
    unit = F.normalize(as_features(features), dim=1)
    return unit.std(dim=0, correction=0).mean().item()  # dim 0 = samples; over dim 1 a collapsed model looks healthy


def rankme(features: Tensor, max_samples: int = 25_600, eps: float = 1e-7) -> float:
    """RankMe: exp of the entropy of the singular values of the un-centred features (N, D); from 1 to min(N, D).

    p = sigma / sum(sigma) + eps. Above `max_samples` rows a fixed random subset is used. An all-zero matrix has rank
    1.
    """
    features = as_features(features)
    if len(features) > max_samples:
        chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:max_samples]
        features = features[chosen.to(features.device)]
    sigma = torch.linalg.svdvals(features.double())
    total = sigma.sum()
    if total == 0:
        return 1.0
    p = sigma / total + eps
    return torch.exp(-(p * p.log()).sum()).item()


def alignment(first: Tensor, second: Tensor, power: float = 2.0) -> float:
    """Mean ||x - y||^power between L2-normalised features (N, D) of two views of the same images; 0 is perfect."""
    x, y = F.normalize(as_features(first, "first"), dim=1), F.normalize(as_features(second, "second"), dim=1)
    if x.shape != y.shape:
        raise ValueError(f"alignment needs two views of the same images, got {tuple(x.shape)} and {tuple(y.shape)}.")
    return (x - y).norm(dim=1).pow(power).mean().item()


def uniformity(features: Tensor, t: float = 2.0, max_samples: int = 4096) -> float:
    """log of the mean of exp(-t ||x - y||^2) over distinct pairs of L2-normalised features (N, D), N >= 2.

    0 when all are equal, about -2t (-4) when spread evenly over the sphere. Above `max_samples`: a fixed random
    subset.
    """
    unit = F.normalize(as_features(features), dim=1)
    if len(unit) < 2:
        raise ValueError("uniformity compares pairs: give at least 2 rows.")
    if len(unit) > max_samples:
        chosen = torch.randperm(len(unit), generator=torch.Generator().manual_seed(0))[:max_samples]
        unit = unit[chosen.to(unit.device)]
    unit = unit.double()
    squared = (2 - 2 * unit @ unit.T).clamp_(min=0)
    pairs = torch.exp(-t * squared)
    return math.log(((pairs.sum() - pairs.diagonal().sum()) / (len(unit) * (len(unit) - 1))).item())


def distribution_entropy(probabilities: Tensor) -> dict[str, float]:
    """Two entropies of teacher or prototype assignments (N, K), as shares of log K, each in [0, 1].

    "entropy": mean entropy of each sample's own answer (1 = every answer uniform: collapsed).
    "marginal_entropy": entropy of the average answer (0 = every sample gets the same output: collapsed).
    """
    p = as_features(probabilities, "probabilities").double()
    if p.min() < 0 or (p.sum(dim=1) - 1).abs().max() > 1e-2:
        raise ValueError("probabilities must be non-negative rows that sum to 1: apply softmax to logits first.")
    log_k = math.log(p.shape[1]) if p.shape[1] > 1 else 1.0
    mean = p.mean(dim=0)
    return {
        "entropy": torch.special.entr(p).sum(dim=1).mean().item() / log_k,
        "marginal_entropy": torch.special.entr(mean).sum().item() / log_k,
    }


def entropy_shares(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """`diagnose`'s "entropy" and "marginal_entropy" from what a method logs: teacher_entropy and prototype_entropy in
    nats as shares of uniform_entropy, ln K. Without the last nothing is judged: their scale is not known."""
    limit = float(metrics.get("uniform_entropy", 0.0))
    names = {"entropy": "teacher_entropy", "marginal_entropy": "prototype_entropy"}
    return {share: float(metrics[name]) / limit for share, name in names.items() if limit > 0 and name in metrics}


def health_report(features: Tensor, second_view: Tensor | None = None) -> dict[str, float]:
    """{"std", "std_ratio", "rankme", "dim", "samples", "uniformity"[, "alignment"]} of features (N, D).

    `std_ratio` is std x sqrt(D), 1 when healthy. `second_view` (N, D): features of another view of the same images.
    """
    features = as_features(features)
    std, dim = feature_std(features), features.shape[1]
    report = {"std": std, "std_ratio": std * math.sqrt(dim), "rankme": rankme(features)}
    report |= {"dim": float(dim), "samples": float(len(features))}
    if len(features) > 1:
        report["uniformity"] = uniformity(features)
    if second_view is not None:
        report["alignment"] = alignment(features, second_view)
    return report


def diagnose(report: Mapping[str, float], start: Mapping[str, float] | None = None) -> list[str]:
    """What is wrong and what to try, as sentences; an empty list means no sign of collapse.

    `report`: any of the keys of `health_report` and `distribution_entropy` (plus "loss"). `start`: the same figures
    measured before training; a network that starts with little spread (a fresh ViT does) is judged by whether it lost
    more. Thresholds: std_ratio < 0.02 or rank < 1.5 is collapse (half the start's value where the start is already
    below), std_ratio < 0.2 or rank < 5 % of min(width, samples) is a warning, entropy > 0.98 log K or marginal entropy
    < 0.05 log K is collapse of the teacher's answers.
    """
    start = start or {}
    words = []
    loss = report.get("loss")
    if loss is not None and not math.isfinite(loss):
        words.append(
            "The loss is NaN or infinite. Lower the learning rate, lengthen the warm-up, or train in float32."
        )
    words += _spread_words(report, start)
    words += _rank_words(report, start)
    if report.get("entropy", 0.0) > UNIFORM_ENTROPY:
        words.append(
            f"Every teacher answer is nearly uniform (entropy {report['entropy']:.2f} of log K): collapse to the "
            "uniform output. Lower the teacher temperature, lengthen its warm-up, or weaken the centring."
        )
    if report.get("marginal_entropy", 1.0) < ONE_ANSWER_ENTROPY:
        words.append(
            f"All images get the same teacher output (entropy of the average {report['marginal_entropy']:.2f} of "
            "log K): collapse to one output. Strengthen the centring or raise the teacher temperature."
        )
    return words


def _spread_words(report: Mapping[str, float], start: Mapping[str, float]) -> list[str]:
    ratio = report.get("std_ratio")
    if ratio is None:
        return []
    before = start.get("std_ratio", math.inf)
    if ratio < min(COLLAPSED_STD, before / 2):
        return [
            f"Collapsed: all images get nearly the same feature (spread {ratio:.3f} of the healthy 1/sqrt(d)). "
            "Lower the learning rate, check that the views differ and that the loss has its guard against collapse "
            "(negatives, stop-gradient and predictor, centring, variance term), then restart from an earlier save."
        ]
    if ratio < min(LOW_STD, before):
        return [
            f"Features are bunched together (spread {ratio:.2f} of the healthy 1/sqrt(d)). If it keeps falling, lower "
            "the learning rate or use larger batches or stronger augmentation."
        ]
    return []


def _rank_words(report: Mapping[str, float], start: Mapping[str, float]) -> list[str]:
    rank, dim = report.get("rankme"), report.get("dim")
    if rank is None:
        return []
    before = start.get("rankme", math.inf)
    of = f" of {dim:.0f}" if dim else ""
    if rank < min(COLLAPSED_RANK, max(before * 0.9, 1.001)):
        return [
            f"Collapsed: the features vary along one direction only (effective rank {rank:.1f}{of}). Lower the "
            "learning rate or raise weight decay on the head, and check the normalisation layers of the head."
        ]
    if dim and rank < min(LOW_RANK * min(dim, report.get("samples", dim)), before):  # rank is at most the sample count
        return [
            f"Few directions are used (effective rank {rank:.1f}{of}): dimensional collapse. Try larger batches, "
            "stronger augmentation, a wider head, or a decorrelating loss (VICReg, Barlow Twins)."
        ]
    return []
