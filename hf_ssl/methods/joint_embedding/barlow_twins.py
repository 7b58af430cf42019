"""Barlow Twins: the cross-correlation of two views' embeddings becomes the identity (Zbontar et al. 2021, 2103.03230).

Teaches that making each dimension agree across views and differ from the others needs no negatives and no teacher.
Siblings: VICReg asks the same of each view's own covariance and adds an explicit variance; W-MSE whitens instead of
penalising; SimCLR contrasts images where this contrasts dimensions.

Over ranks. The official code sums the cross-correlation with an all-reduce that carries no gradient: after DDP's mean
its gradient is 1/W of the right one, which LARS hides for weights but not for biases. Here it is the right one.
"""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...distributed import sum_with_grad, world_size
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class BarlowTwinsConfig(MultiViewConfig):
    """projection_dim, hidden_dim, num_layers: the projector (8192 three times). redundancy_weight: λ of the terms off
    the diagonal (.0051). bias_gradient_scale: biases and norms learn at this share of the rate (.0048/.2), by their
    gradient: an optimiser that ignores its scale, such as AdamW, does not notice. joint_batchnorm: the official code
    passes the views one by one."""

    model_type = "ssl_barlow_twins"

    projection_dim: int = 8192
    hidden_dim: int = 8192
    num_layers: int = 3
    redundancy_weight: float | int = 0.0051
    bias_gradient_scale: float | int = 0.024
    joint_batchnorm: bool = False


class BarlowTwinsImageProcessor(SSLImageProcessor):
    """BYOL's asymmetric pair: blur always / rarely with solarisation (section 2.2)."""

    views: ClassVar = presets.BYOL


class BarlowTwinsForPreTraining(MultiViewModel):
    """Backbone → projector → cross-correlation of the two views, each normalised over the global batch."""

    config: BarlowTwinsConfig
    paper = Paper(
        name="Barlow Twins",
        title="Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
        arxiv="2103.03230",
        bibtex="zbontar2021barlow",
        authors="Zbontar, Jure and Jing, Li and Misra, Ishan and LeCun, Yann and Deny, Stéphane",
        teaches="each dimension agrees across two views and with no other dimension",
    )
    processor_class = BarlowTwinsImageProcessor
    lr_scaling = ("linear", 256)
    compares_images = "it correlates dimensions over the images of the batch"
    default_arguments: ClassVar = {
        "optim": "lars", "base_learning_rate": 0.2, "min_learning_rate": 2e-4, "weight_decay": 1e-6,
        "warmup_steps": 0.1, "per_device_train_batch_size": 256, "num_train_epochs": 100,
    }  # fmt: skip

    def add_parts(self, config: BarlowTwinsConfig) -> None:
        self.projector = self.make_projector(config.num_layers, last_bias=False)

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = self.project(self.projector, embeddings, len(pixel_values)).chunk(2)
        agreement, redundancy = barlow_terms(cross_correlation(first, second))
        metrics = {"on_diagonal": agreement.detach(), "off_diagonal": redundancy.detach()}
        return agreement + self.config.redundancy_weight * redundancy, metrics

    def before_optimizer_step(self, progress: float) -> None:
        gradients: list[Any] = [p.grad for p in self.parameters() if p.ndim == 1 and p.grad is not None]
        if self.config.bias_gradient_scale != 1:
            torch._foreach_mul_(gradients, float(self.config.bias_gradient_scale))


def cross_correlation(first: Tensor, second: Tensor, epsilon: float = 1e-5) -> Tensor:
    """(B, D) twice -> (D, D) over the global batch; each view is normalised by its own mean and biased variance."""
    with torch.autocast(first.device.type, enabled=False):  # sums over the batch need float32
        views = torch.stack([first, second]).float()  # (2, B, D)
        count = len(first) * world_size()
        views = views - sum_with_grad(views.sum(1, keepdim=True)) / count
        variance = sum_with_grad(views.square().sum(1, keepdim=True)) / count
        first, second = views * (variance + epsilon).rsqrt()
        return sum_with_grad(first.T @ second) / count


def barlow_terms(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_i (1 − C_ii)² and Σ_{i≠j} C_ij²: sums, not means, as in eq. 1."""
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum(), correlation.square().sum() - diagonal.square().sum()
