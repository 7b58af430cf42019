"""Losses that two methods or more share. All are means over the local rows; what they compare with is global."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """−cos, mean over the rows: (N, D) twice. ‖p̂ − ẑ‖² is 2 + 2 times this. Gradients flow into both."""
    return -F.cosine_similarity(predictions.float(), targets.float(), dim=-1).mean()


@torch.no_grad()
def spread(rows: Tensor) -> Tensor:
    """√D · standard deviation per channel of the normalised rows (N, D), mean over channels: about 1 for rows that
    point everywhere, 0 for rows that all agree (SimSiam, section 4.1). A metric, of the local rows."""
    return F.normalize(rows.float(), dim=1).std(0, correction=0).mean() * rows.shape[1] ** 0.5


def similarities(rows: Tensor, others: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, D) and (K, D) -> products / τ (B, K), in float32 whatever autocast says."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ others.float().T / temperature


def hit_rate(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the rows of logits (B, K) whose ``target`` (B,) ranks first."""
    return (logits.detach().argmax(1) == target).float().mean()


def choice_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (B, K) against ``target`` (B,), mean over the rows, and ``hit_rate``."""
    return F.cross_entropy(logits, target), hit_rate(logits, target)


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A query's own key among shared negatives (MoCo, eq. 1): queries, keys (B, D), negatives (K, D), unit vectors.

    Returns the cross-entropy over 1 + K, the key first, mean over the queries, and the share of keys that rank first.
    """
    logits = info_nce_logits(queries, keys, negatives, temperature)
    return choice_loss(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def info_nce_logits(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """(B, 1 + K) similarities / τ: each query to its own key, then to negatives, (K, D) or its own (B, K, D)."""
    with torch.autocast(queries.device.type, enabled=False):  # similarities / τ need float32
        queries, negatives = queries.float(), negatives.float()
        own = (queries * keys.float()).sum(1, keepdim=True)
        others = queries @ negatives.T if negatives.ndim == 2 else torch.einsum("bd,bkd->bk", queries, negatives)
        return torch.cat([own, others], dim=1) / temperature


def nt_xent(
    first: Tensor, second: Tensor, temperature: float, normalise: bool = True, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """NT-Xent (eq. 1) of the local anchors against the global batch.

    first, second: (B, D) projections of the two views, normalised here unless told not to. Returns the mean over the
    2·B local anchors (the official code returns the sum of the two per-view means: twice this value) and the share of
    anchors whose positive ranks first. The gather carries gradients: the mean over ranks is the single-process loss.
    memory: (K, D) further negatives, unit vectors.
    """
    return choice_loss(*contrastive_logits(first, second, temperature, normalise, memory))


def contrastive_logits(
    first: Tensor, second: Tensor, temperature: float, normalise: bool = True, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Similarities / τ of the 2·B local anchors to the 2·W·B global keys, an anchor to itself at −∞: (2·B, 2·W·B).

    Rows and columns are view-major; also returns the column of each anchor's positive, (2·B,). memory: (K, D) unit
    vectors, K columns more.
    """
    if len(first) * distributed.world_size() < 2:
        raise ValueError("NT-Xent has no negatives in a global batch of one image")
    anchors = torch.stack([first.float(), second.float()])  # (2, B, D)
    anchors = F.normalize(anchors, dim=-1) if normalise else anchors
    keys = torch.cat([distributed.gather_with_grad(view) for view in anchors])  # (2·W·B, D)
    keys = keys if memory is None else torch.cat([keys, memory.float()])
    logits = similarities(anchors.flatten(0, 1), keys, temperature)
    rows, total = distributed.own_rows(first), len(first) * distributed.world_size()
    itself, positive = torch.cat([rows, rows + total]), torch.cat([rows + total, rows])
    return logits.scatter(1, itself[:, None], float("-inf")), positive


def variance_and_covariance(rows: Tensor, epsilon: float = 1e-4) -> tuple[Tensor, Tensor]:
    """VICReg's regularisers (section 4.1) over the rows of all ranks: (B, D), or (B, K, D) for a mean over K places.

    The hinge, mean over D of max(0, 1 − √(variance + ε)), and Σ_{i≠j} C_ij² / D; both divide by N − 1. ValueError for
    a global batch of one image.
    """
    if len(rows) * distributed.world_size() < 2:
        raise ValueError("the variance of a global batch of one image is undefined: take at least 2")
    with torch.autocast(rows.device.type, enabled=False):  # sums over the batch need float32
        rows = distributed.gather_with_grad(rows.float()).movedim(0, -2)
        rows = rows - rows.mean(-2, keepdim=True)  # after the gather: the mean is the global batch's
        covariance = rows.mT @ rows / (rows.shape[-2] - 1)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        hinge = F.relu(1 - (variance + epsilon).sqrt()).mean()
        others = covariance.square().sum((-2, -1)) - variance.square().sum(-1)
        return hinge, others.mean() / rows.shape[-1]


def vicreg_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """VICReg's terms of two views, (B, D) or (B, K, D) each: the mean squared error of the local rows, the mean of the
    two variance hinges, the sum of the two covariance penalties (as in the official code; the paper adds both)."""
    variances, covariances = zip(*map(variance_and_covariance, (first, second)), strict=True)
    invariance = F.mse_loss(first.float(), second.float())
    return invariance, (variances[0] + variances[1]) / 2, covariances[0] + covariances[1]


def vicreg_sum(config: Any, invariance: Tensor, variance: Tensor, covariance: Tensor) -> Tensor:
    """λ · invariance + μ · variance + ν · covariance (VICReg, eq. 6) with the config's weights."""
    return (
        config.invariance_weight * invariance
        + config.variance_weight * variance
        + config.covariance_weight * covariance
    )


def dino_loss(student: Tensor, targets: Tensor, batch: int, temperature: float, shared: bool = True) -> Tensor:
    """Cross-entropy of every student crop against every teacher crop but itself (DINO, eq. 3).

    student: (V·B, K) logits, crop-major, the large crops first; targets: (T·B, K) probabilities. Mean over the batch,
    then over the T·V − T pairs of different crops. shared: False where the student's crops are others than the
    teacher's; all T·V pairs then count.
    """
    views, teachers = len(student) // batch, len(targets) // batch
    if shared and views < 2:
        raise ValueError("DINO compares different crops: it needs at least 2 views per image, got 1")
    log_probabilities = F.log_softmax(student.float() / temperature, dim=-1).unflatten(0, (views, batch))
    targets = targets.unflatten(0, (teachers, batch))
    with torch.autocast(student.device.type, enabled=False):  # the sum over prototypes in float32
        agreement = torch.einsum("tbk,vbk->tv", targets.float(), log_probabilities) / batch
    if not shared:
        return -agreement.mean()
    same = torch.eye(teachers, views, dtype=torch.bool, device=agreement.device)
    return -agreement.masked_fill(same, 0.0).sum() / (teachers * views - teachers)


def patch_loss(student: Tensor, targets: Tensor, weights: Tensor, images: int, temperature: float) -> Tensor:
    """Cross-entropy on masked patches (iBOT, eq. 3, as DINOv2 averages it): mean over each image's, then over images.

    student: (M, K) logits; targets: (M, K) probabilities; weights: (M,), 1 / masked patches of the same image; images:
    all of them, those with nothing masked included. M may differ between ranks: a mean over images needs no counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        entropy = -(targets.float() * F.log_softmax(student.float() / temperature, dim=-1)).sum(-1)
    return (entropy * weights).sum() / images


def koleo(x: Tensor, neighbours: int = 1) -> Tensor:
    """Kozachenko–Leonenko estimate: −mean log distance of the local rows (B, D) to their nearest in the global batch.

    Rows are normalised here, so give features as the backbone makes them: behind a head that normalises, the gradient
    cancels. It flows into both ends. The official DINOv2 looks among one GPU's rows; here, as in DINOv3, among all.
    """
    if len(x) * distributed.world_size() <= neighbours:
        raise ValueError(f"KoLeo needs more than {neighbours} images in the global batch: set its weight to 0")
    with torch.autocast(x.device.type, enabled=False):  # distances near 0 have no logarithm in half precision
        rows = F.normalize(x.float(), dim=-1)
        everyone = distributed.gather_with_grad(rows)
        with torch.no_grad():
            others = similarities(rows, everyone).scatter_(1, distributed.own_rows(rows)[:, None], -2.0)
            nearest = others.topk(neighbours, dim=1).indices  # (B, neighbours)
        distances = F.pairwise_distance(rows[:, None].expand(-1, neighbours, -1), everyone[nearest], eps=1e-8)
        return -(distances + 1e-8).log().mean()


def gram_loss(student: Tensor, target: Tensor, normalise: bool = True, negatives: str = "keep") -> Tensor:
    """Squared difference of two Gram matrices, mean over B·N·N entries (DINOv3, eq. 2, which writes a sum).

    student, target: (B, N, D) patch features; an image's patches are compared with one another. normalise: cosines.
    negatives: "keep" (every published setting), "clip" at 0 in both matrices, or "clip_target".
    """
    grams = []
    with torch.autocast(student.device.type, enabled=False):
        for features, clipped in ((student, negatives == "clip"), (target, negatives != "keep")):
            features = F.normalize(features.float(), dim=-1) if normalise else features.float()
            gram = features @ features.transpose(1, 2)
            grams.append(gram.clamp(min=0) if clipped else gram)
        return F.mse_loss(grams[0], grams[1])


@torch.no_grad()
def target_entropies(targets: Tensor, logarithms: Tensor | None = None) -> dict[str, Tensor]:
    """Mean entropy of the targets (N, K) and entropy of their mean, in nats: where the first reaches uniform_entropy,
    ln K, or the second 0, they have collapsed.

    logarithms: of the targets, where they are at hand; taking them again is slow over 65 536 prototypes.
    """
    mean = targets.mean(0)
    if logarithms is None:
        entropy = torch.special.entr(targets).sum(-1).mean()
    else:
        entropy = -(targets.flatten() @ logarithms.flatten()) / len(targets)
    return {
        "teacher_entropy": entropy,
        "prototype_entropy": torch.special.entr(mean).sum(),
        "uniform_entropy": torch.full_like(entropy, math.log(targets.shape[-1])),
    }
