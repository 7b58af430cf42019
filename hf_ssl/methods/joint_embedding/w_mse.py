"""W-MSE: positives meet after their batch is whitened (Ermolov et al. 2021, 2007.06346).

Teaches that full whitening scatters the embeddings, so that pulling positives together cannot collapse them; several
positives per image cost no negatives.
Siblings: Barlow Twins and VICReg penalise correlation where this removes it; SimCLR scatters by negatives; BYOL by a
predictor and a teacher.

The official code whitens on one GPU. Here sub-batches are parts of the global batch, gathered with gradient.
"""

from itertools import combinations
from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...distributed import gather_with_grad, step_uniform, world_size
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets

_FAINT = 1e-3  # share of the identity below which a covariance that lacks a direction has no factor in float32


@strict
class WMSEConfig(MultiViewConfig):
    """projection_dim, hidden_dim, num_layers: the head's. sub_batch: images that are whitened together, more than
    projection_dim (128 for 64, 256 for 128). iterations: random splits into sub-batches that a step averages. epsilon:
    share of the identity in the covariance (0 in the official code: a degenerate batch is then NaN). normalise:
    distances on the sphere; False is Euclidean. joint_batchnorm: of the backbone; as in the official code the head's
    BatchNorm always sees all views."""

    model_type = "ssl_w_mse"

    projection_dim: int = 64
    hidden_dim: int = 1024
    num_layers: int = 2
    sub_batch: int = 128
    iterations: int = 1
    epsilon: float | int = 1e-6
    normalise: bool = True
    joint_batchnorm: bool = False
    limits = {"sub_batch": "[1, inf)", "iterations": "[1, inf)"}

    def __post_init__(self, **kwargs):
        if self.sub_batch <= self.projection_dim:
            raise ValueError(
                f"{self.sub_batch} images cannot be whitened in {self.projection_dim} dimensions: take a larger "
                "sub_batch or a smaller projection_dim"
            )
        super().__post_init__(**kwargs)


class WMSEImageProcessor(SSLImageProcessor):
    """Two random crops with milder grayscale than MoCo's and no blur; W-MSE 4 has count 4 (section 5)."""

    views: ClassVar = [
        {
            "key": "pixel_values", "count": 2, "scale": [0.2, 1.0], **presets.HALF_COLOUR, "interpolation": "bicubic",
            "grayscale_p": 0.1,
        }
    ]  # fmt: skip


class WMSEForPreTraining(MultiViewModel):
    """Backbone → head → whitening of sub-batches, each view by itself → squared distance between positives."""

    config: WMSEConfig
    compared = None
    paper = Paper(
        name="W-MSE",
        title="Whitening for Self-Supervised Representation Learning",
        arxiv="2007.06346",
        bibtex="ermolov2021whitening",
        authors="Ermolov, Aleksandr and Siarohin, Aliaksandr and Sangineto, Enver and Sebe, Nicu",
        teaches="positives attract in a space that whitening keeps spread out",
    )
    processor_class = WMSEImageProcessor
    default_backbone = "resnet-18"
    lr_scaling = ("none", 256)
    default_arguments: ClassVar = {
        "optim": "adamw_torch_fused", "base_learning_rate": 2e-3, "weight_decay": 1e-6, "warmup_steps": 500,
        "per_device_train_batch_size": 256, "num_train_epochs": 200,
    }  # fmt: skip

    def add_parts(self, config: WMSEConfig) -> None:
        self.projector = self.make_projector(config.num_layers, hidden_bias=True)

    def fewest_images(self) -> tuple[int, str]:
        c = self.config
        if c.epsilon >= _FAINT:
            return 2, "their covariance is whitened"
        return c.projection_dim + 1, (
            f"fewer do not span the projection_dim={c.projection_dim} dimensions that are whitened (a smaller "
            f"projection_dim, or an epsilon of at least {_FAINT:g}, takes fewer)"
        )

    def check_batch(self, images: int, ranks: int | None = None) -> None:
        super().check_batch(images, ranks)
        sub_batches(images * (world_size() if ranks is None else ranks), self.config.sub_batch)

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows, c = self.projector(embeddings).float().unflatten(0, (-1, len(pixel_values))), self.config
        rows = gather_with_grad(rows.transpose(0, 1)).transpose(0, 1)  # (V, W·B, D)
        parts = sub_batches(rows.shape[1], c.sub_batch)
        orders = step_uniform(self.step, c.iterations, rows.shape[1]).argsort(-1)
        losses = []
        for order in orders:
            split = rows[:, order].unflatten(1, (parts, -1))  # (V, parts, n, D)
            losses.append(positive_distance(whiten(split, c.epsilon), c.normalise))
        return torch.stack(losses).mean(), {"projection_std": rows.detach().std(1).mean()}


def sub_batches(images: int, size: int) -> int:
    """Into how many sub-batches of about ``size`` a global batch is split; ValueError where they would be unequal."""
    parts = max(images // size, 1)
    if images % parts:
        raise ValueError(
            f"W-MSE cannot split a global batch of {images} images into {parts} equal sub-batches: choose another "
            "batch or sub_batch"
        )
    return parts


def whiten(rows: Tensor, epsilon: float = 0.0) -> Tensor:
    """(..., n, D) -> the same shape, of mean 0 and covariance I over the n rows (section 3.1, by Cholesky).

    The covariance C, divided by n − 1, is taken as (1 − ε)·C + ε·I.
    """
    with torch.autocast(rows.device.type, enabled=False):  # a factorisation needs float32
        rows = rows.float() - rows.float().mean(-2, keepdim=True)
        covariance = rows.mT @ rows / (rows.shape[-2] - 1)
        identity = torch.eye(rows.shape[-1], device=rows.device)
        factor, _ = torch.linalg.cholesky_ex((1 - epsilon) * covariance + epsilon * identity)  # no wait for its status
        return torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT


def positive_distance(views: Tensor, normalise: bool = True) -> Tensor:
    """(V, ..., D) -> mean over all pairs of views of 2 − 2 cos, or of the squared difference per dimension."""
    if normalise:
        views = F.normalize(views, dim=-1)
    scale = views.shape[-1] if normalise else 1  # on the sphere ‖a − b‖² = 2 − 2 cos is a sum over dimensions
    return torch.stack([F.mse_loss(a, b) for a, b in combinations(views, 2)]).mean() * scale
