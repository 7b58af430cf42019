"""Linear probes on cached features. Settings are chosen on a held-out part of TRAIN; test only scores the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.evaluation.knn import as_features, encode_labels, labelled, labels_list

logger = logging.getLogger(__name__)

# E5 searches 45 strengths; these six span the range in which choices fall for standardised features
L2_STRENGTHS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
_PATIENCE = 2  # strengths tried after the best one so far: weaker ones only overfit more, and cost the most iterations
DINOV2_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


def linear_probe(
    train_features: Tensor,
    train_labels: Sequence[Hashable] | Tensor,
    test_features: Tensor,
    test_labels: Sequence[Hashable] | Tensor,
    solver: str = "lbfgs",
    strengths: Sequence[float] = L2_STRENGTHS,
    learning_rates: Sequence[float] = DINOV2_LEARNING_RATES,
    iterations: int | None = None,
    batch_size: int = 1024,
    holdout: float = 0.2,
    groups: Sequence[Hashable] | Tensor | None = None,
    seed: int = 0,
) -> dict[str, float | str]:
    """Accuracy of a linear classifier on frozen features, train (N, D) and test (M, D), standardised by train.

    solver "lbfgs": multinomial logistic regression, mean cross-entropy + strength/2 ||W||^2, zero init, L-BFGS with at
    most `iterations` (default 40) a strength, the strongest first, until two in a row are worse than the best.
    solver "sgd": DINOv2's sweep, SGD momentum .9, weight decay 0, cosine to 0, weight N(0, .01), learning rates x
    batch/256, all heads in one pass of `iterations` (default 1000) batches of `batch_size` random rows.
    The strength or rate is chosen by accuracy, then cross-entropy, on a stratified `holdout` share of train; then the
    probe is refitted on all of train. `groups` (N): rows of one group are held out together (two drawings of one
    emoji), else near-duplicates flatter the choice. Labels are names or numbers; one unknown to train is wrong,
    and rows without one (None, NaN, -1, "") are as if they were not there.
    Returns {"top1", "top5" (fractions), "chosen" (strength or learning rate), "holdout_top1", "solver"}.
    Raises ValueError for sizes that do not match, fewer than two classes, or an unknown solver.
    """
    x, x_test = as_features(train_features, "train_features"), as_features(test_features, "test_features")
    if (
        len(train_labels) != len(x)
        or len(test_labels) != len(x_test)
        or (groups is not None and len(groups) != len(x))
    ):
        raise ValueError(
            f"{len(x)} train and {len(x_test)} test features came with "
            f"{len(train_labels)} and {len(test_labels)} labels"
            + (f" and {len(groups)} groups." if groups is not None else ".")
        )
    x, train_labels, rows = labelled(x, train_labels, "train_features")
    x_test, test_labels, _ = labelled(x_test, test_labels, "test_features")
    if groups is not None and rows is not None:
        groups = [labels_list(groups)[row] for row in rows.tolist()]
    y, y_test, classes = encode_labels(train_labels, test_labels)
    if len(classes) < 2:
        raise ValueError(f"A linear probe needs at least 2 classes in train, got {classes}.")
    held = _holdout(y, holdout, groups, seed)
    fit = ~held
    if not held.any():
        logger.warning("Linear probe: no class has two examples, so the choice is made on the fitted rows themselves.")
        fit = held = torch.ones_like(held)
    probe: LBFGSProbe | _SGDProbe
    if solver == "lbfgs":
        probe, settings = LBFGSProbe(len(classes), iterations or 40), tuple(sorted(strengths, reverse=True))
    elif solver == "sgd":
        probe, settings = _SGDProbe(len(classes), iterations or 1000, batch_size, seed), tuple(learning_rates)
    else:
        raise ValueError(f'solver must be "lbfgs" or "sgd", got {solver!r}.')

    fit_scale, scale = _Standardise(x[fit]), _Standardise(x)
    x_held, scores, best = fit_scale(x[held]), [], 0
    for i, weight in enumerate(probe.fit(fit_scale(x[fit]), y[fit], settings)):
        scores.append(_score(x_held, y[held], weight))
        best = max(range(i + 1), key=lambda j: (scores[j]["top1"], -scores[j]["loss"]))
        if solver == "lbfgs" and i - best >= _PATIENCE:
            break
    (final,) = probe.fit(scale(x), y, settings[best : best + 1])
    test = _score(scale(x_test), y_test, final)
    return {
        "top1": test["top1"],
        "top5": test["top5"],
        "chosen": settings[best],
        "holdout_top1": scores[best]["top1"],
        "solver": solver,
    }


class _Standardise:
    def __init__(self, x: Tensor):
        self.mean, self.std = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(1e-6)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _score(x: Tensor, y: Tensor, weight: Tensor) -> dict[str, float]:
    """Top-1, top-5 and mean cross-entropy (over rows of a known class)."""
    logits = (x @ weight[:-1] + weight[-1]).cpu()
    hit = logits.argsort(dim=1, descending=True, stable=True)[:, :5] == y[:, None]
    loss = F.cross_entropy(logits, y, ignore_index=-1)
    return {
        "top1": hit[:, 0].double().mean().item(),
        "top5": hit.any(dim=1).double().mean().item(),
        "loss": loss.item(),
    }


def _holdout(y: Tensor, share: float, groups: Sequence[Hashable] | Tensor | None, seed: int) -> Tensor:
    """Boolean (N,): rows held out. Stratified by class; a class of one group stays whole in the fit."""
    if not 0 < share < 1:
        raise ValueError(f"holdout must be between 0 and 1, got {share}.")
    unit = torch.arange(len(y)) if groups is None else encode_labels(groups, [])[0]
    draw = torch.rand(int(unit.max()) + 1, generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(y), dtype=torch.bool)
    for label in range(int(y.max()) + 1):
        units = unit[y == label].unique()
        if len(units) > 1:
            count = min(len(units) - 1, max(1, round(share * len(units))))
            held |= (y == label) & torch.isin(unit, units[draw[units].argsort()[:count]])
    return held


class LBFGSProbe:
    def __init__(self, classes: int, iterations: int):
        self.classes, self.iterations = classes, iterations

    def fit(self, x: Tensor, y: Tensor, strengths: Sequence[float]) -> Iterator[Tensor]:
        """One (D + 1, K) matrix (last row: bias) per strength; each starts from the one before."""
        weight = x.new_zeros(x.shape[1] + 1, self.classes)
        y = y.to(x.device)
        for strength in strengths:
            weight = weight.clone().requires_grad_()
            optimiser = torch.optim.LBFGS(
                [weight],
                max_iter=self.iterations,
                tolerance_grad=1e-5,
                tolerance_change=1e-6,
                line_search_fn="strong_wolfe",
            )

            def closure(weight=weight, optimiser=optimiser, strength=strength):
                optimiser.zero_grad()
                loss = F.cross_entropy(torch.addmm(weight[-1], x, weight[:-1]), y)
                loss = loss + strength / 2 * weight[:-1].square().sum()
                loss.backward()
                return loss

            with torch.enable_grad():
                optimiser.step(closure)
            weight = weight.detach()
            yield weight


class _SGDProbe:
    def __init__(self, classes: int, iterations: int, batch_size: int, seed: int):
        self.classes, self.iterations, self.batch_size, self.seed = classes, iterations, batch_size, seed

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor, learning_rates: Sequence[float]) -> list[Tensor]:
        """One (D + 1, K) matrix per rate. Heads share batches and first weights, nothing else."""
        generator = torch.Generator().manual_seed(self.seed)
        heads, batch = len(learning_rates), min(self.batch_size, len(x))
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        y = y.to(x.device)
        first = 0.01 * torch.randn(x.shape[1], 1, self.classes, generator=generator)
        first[-1] = 0
        weight = first.to(x.device).expand(-1, heads, -1).flatten(1)  # (D + 1, heads * K): one matmul for all heads
        velocity = torch.zeros_like(weight)
        rate = torch.tensor(learning_rates, device=x.device).repeat_interleave(self.classes) * batch / 256
        for step in range(self.iterations):
            rows = torch.randint(len(x), (batch,), generator=generator).to(x.device)
            inputs, truth = x[rows], y[rows]
            error = torch.softmax((inputs @ weight).view(batch, heads, self.classes), dim=2)
            error[torch.arange(batch, device=x.device), :, truth] -= 1  # d CE / d logits = softmax - one-hot
            velocity.mul_(0.9).add_(inputs.T @ error.flatten(1), alpha=1 / batch)
            weight = weight - rate * (0.5 * (1 + math.cos(math.pi * step / self.iterations))) * velocity
        return list(weight.view(-1, heads, self.classes).unbind(1))
