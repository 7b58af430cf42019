"""Features on a plane: exact t-SNE for some hundred points, and room for a thumbnail at each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ITERATIONS, _EARLY = 500, 150  # of which the early ones exaggerate attraction, so that clusters form first


def pca(features: Tensor, dimensions: int) -> Tensor:
    """(N, D) -> (N, min(dimensions, N, D)) float64: coordinates along the directions of most variance, sign fixed."""
    centred = features.double() - features.double().mean(0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    sign = v.gather(1, v.abs().argmax(1, keepdim=True))[:, 0].sign()  # the SVD leaves it open
    return (u * s * sign)[:, :dimensions]


def tsne(features: Tensor, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """Exact t-SNE (van der Maaten & Hinton 2008) from a PCA start: (N, D) -> (N, 2). Meant for N up to about 1,000.

    Cost: N² per step, 500 steps; about 2 s for N = 800. The same input gives the same map.
    """
    n = len(features)
    points = pca(features, 50)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if n < 4:
        return torch.cat([points, points.new_zeros(n, 2)], dim=1)[:, :2].numpy()
    affinity = _affinities(points, min(perplexity, (n - 1) / 3)).float()
    start = torch.cat([points, points.new_zeros(n, 2)], dim=1)[:, :2]
    y = (1e-4 * start / start[:, 0].std().clamp(min=1e-12) + 1e-6 * noise).float()
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    exaggeration = 12.0
    rate = max(n / exaggeration, 50.0)
    for step in range(_ITERATIONS):
        early = step < _EARLY
        kernel = 1 / (1 + torch.cdist(y, y).square())
        kernel.fill_diagonal_(0)
        pull = (affinity * (exaggeration if early else 1.0) - kernel / kernel.sum()) * kernel
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gains = torch.where(gradient.sign() == velocity.sign(), gains * 0.8, gains + 0.2).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y.double().numpy()


def _affinities(points: Tensor, perplexity: float) -> Tensor:
    """Symmetric joint probabilities (N, N); each row's Gaussian is as wide as `perplexity` neighbours ask for."""
    distance = torch.cdist(points, points).square()
    distance = distance / distance.mean().clamp(min=1e-300)  # so that one bracket of widths fits every scale
    low, high = distance.new_full((len(points), 1), -30.0), distance.new_full((len(points), 1), 30.0)
    goal = float(np.log(perplexity))
    for _ in range(60):  # bisection of the log precision: entropy falls as it grows
        middle = (low + high) / 2
        logits = (-distance * middle.exp()).fill_diagonal_(float("-inf"))
        p = logits.softmax(1)
        flat = torch.special.entr(p).sum(1, keepdim=True) > goal
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    return ((p + p.T) / (2 * len(points))).clamp(min=1e-12)


def fit_box(points: np.ndarray, height: float = 1.0, margin: float = 0.03) -> np.ndarray:
    """(N, 2) -> into a box of width 1; the farthest 1 % go to its edge, a flat cloud is stretched up to twice."""
    low, high = np.quantile(points, 0.005, axis=0), np.quantile(points, 0.995, axis=0)
    extent = np.maximum(high - low, 1e-12)
    scale = (np.array([1.0, height]) - 2 * margin) / extent
    scale = np.minimum(scale, 2 * scale.min())
    middle = np.array([0.5, height / 2])
    placed = (points - (low + high) / 2) * scale + middle
    return placed.clip(margin, [1 - margin, height - margin])


def turn_to(points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`points` rotated or mirrored to lie as near to `reference` as they can: a map's orientation means nothing."""
    centred = points - points.mean(0)
    u, _, v = np.linalg.svd(centred.T @ (reference - reference.mean(0)))
    return centred @ u @ v


def thin(points: np.ndarray, distance: float, seed: int = 0) -> np.ndarray:
    """Positions of a random subset of (N, 2) no two of which are closer than `distance`, sorted."""
    kept: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(points)):
        if not kept or np.abs(points[kept] - points[i]).max(1).min() >= distance:
            kept.append(int(i))
    return np.sort(np.array(kept, dtype=int))


def push_apart(points: np.ndarray, side: float, height: float = 1.0, rounds: int = 60) -> np.ndarray:
    """Squares of `side` at (N, 2) nudged until few overlap; they stay within the box of width 1 and `height`."""
    rng = np.random.default_rng(0)
    points = points + rng.normal(0, side * 1e-3, points.shape)  # two at one place need a direction
    for _ in range(rounds):
        apart = points[:, None] - points[None]
        overlap = side - np.abs(apart)
        touching = (overlap > 0).all(-1)
        np.fill_diagonal(touching, False)
        if not touching.any():
            break
        along = np.argmin(overlap, axis=-1)[..., None] == np.arange(2)  # the shorter way out
        move = np.sign(apart) * np.maximum(overlap, 0) * along * touching[..., None]
        points = points + 0.25 * move.sum(1)
        points = points.clip(side / 2, [1 - side / 2, height - side / 2])
    return points
