"""LeJEPA: views agree with their image's large views, and embeddings are an isotropic Gaussian (2511.08544).

Teaches that one distribution test per random direction (SIGReg) replaces teacher, predictor, stop-gradient and
schedules; one weight trades it against agreement.
Siblings: VICReg constrains two moments, variance and covariance, where SIGReg constrains the whole characteristic
function; DINO has the same crops, a teacher and prototypes.

Large and small crops count in both terms. The authors' minimal example has views of one size, whose centre is the mean
of all: the same here where there are no small crops. λ is recalled from the paper (.05); the minimal example has .02,
256 directions and 16 dimensions. Over ranks the characteristic functions are those of the global batch, with the full
gradient.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...distributed import step_normal, sum_with_grad, world_size
from ...modeling import Paper, SSLOutput
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class LeJEPAConfig(MultiViewConfig):
    """sigreg_weight: λ of SIGReg; agreement has 1 − λ. directions: how many random ones a step tests. knots, largest:
    the integral's, from 0 to largest. projection_dim, hidden_dim, num_layers: the projector's. joint_batchnorm: the
    authors' example passes all views at once."""

    model_type = "ssl_lejepa"

    sigreg_weight: float | int = 0.05
    directions: int = 1024
    knots: int = 17
    largest: float | int = 3.0
    projection_dim: int = 128
    hidden_dim: int = 2048
    num_layers: int = 3
    limits = {"directions": "[1, inf)", "knots": "[2, inf)", "largest": "(0, inf)"}

    def __post_init__(self, **kwargs):
        if not 0 < self.sigreg_weight < 1:
            raise ValueError(f"sigreg_weight must lie between 0 and 1, not {self.sigreg_weight}")
        super().__post_init__(**kwargs)


class LeJEPAImageProcessor(SSLImageProcessor):
    """Two large crops and six small ones, colours alike (README of the official code; 98 px for patches of 14)."""

    views: ClassVar = [
        {
            "key": "pixel_values", "count": 2, "scale": [0.3, 1.0], **presets.BYOL_COLOUR, "blur_p": 0.5,
            "solarize_p": 0.2,
        },
        {
            "key": "local_pixel_values", "count": 6, "size": 96, "scale": [0.05, 0.3], **presets.BYOL_COLOUR,
            "blur_p": 0.5, "solarize_p": 0.2,
        },
    ]  # fmt: skip


class LeJEPAForPreTraining(MultiViewModel):
    """Backbone → projector → agreement of all views with the mean of the large ones, and SIGReg of each view."""

    config: LeJEPAConfig
    compared = None
    paper = Paper(
        name="LeJEPA",
        title="LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics",
        arxiv="2511.08544",
        bibtex="balestriero2025lejepa",
        authors="Balestriero, Randall and LeCun, Yann",
        teaches="views agree while embeddings are an isotropic Gaussian in every direction",
    )
    processor_class = LeJEPAImageProcessor
    default_backbone = "vit-small"
    lr_scaling = ("none", 256)
    compares_images = "SIGReg tests how the images of the batch are distributed"
    default_arguments: ClassVar = {
        "optim": "adamw_torch_fused", "base_learning_rate": 5e-4, "min_learning_rate": 5e-7, "weight_decay": 0.05,
        "warmup_steps": 0.1, "per_device_train_batch_size": 128, "num_train_epochs": 100,
    }  # fmt: skip

    def add_parts(self, config: LeJEPAConfig) -> None:
        self.projector = self.make_projector(config.num_layers, hidden_bias=True)

    def losses(self, pixel_values: Tensor, local_pixel_values: Tensor | None = None) -> SSLOutput:
        """pixel_values: (B, 2, C, H, W) large crops; local_pixel_values: (B, V, C, h, w)."""
        self.check_views(pixel_values)
        encoded = self.encode_crops(pixel_values, local_pixel_values)
        batch, c = len(pixel_values), self.config
        projected = self.project(self.projector, torch.cat(encoded), batch).float().unflatten(0, (-1, batch))
        centre = projected[: pixel_values.shape[1]].mean(0)
        agreement = (projected - centre).square().mean()
        directions = step_normal(self.step, projected.shape[-1], c.directions)
        gaussian = sigreg(projected, directions, c.knots, c.largest)
        loss = (1 - c.sigreg_weight) * agreement + c.sigreg_weight * gaussian
        return SSLOutput(loss, encoded[0], {"agreement": agreement.detach(), "sigreg": gaussian.detach()})


def sigreg(views: Tensor, directions: Tensor, knots: int = 17, largest: float = 3.0) -> Tensor:
    """Epps and Pulley's statistic against N(0, 1), mean over views and directions: (V, B, D), (D, M) -> scalar.

    N · ∫ |φ̂(t) − e^{−t²/2}|² e^{−t²/2} dt from −largest to largest by the trapezoid rule, with φ̂ the characteristic
    function of the N projections of one view in the global batch, and directions of any length.
    """
    with torch.autocast(views.device.type, enabled=False):  # sums of cosines need float32
        t = torch.linspace(0, largest, knots, device=views.device)
        gauss = torch.exp(-t.square() / 2)
        weights = torch.full_like(t, 2 * largest / (knots - 1))  # φ̂'s real part is even, its imaginary part odd
        weights[0] = weights[-1] = largest / (knots - 1)
        angles = (views.float() @ torch.nn.functional.normalize(directions, dim=0))[..., None] * t  # (V, B, M, knots)
        count = views.shape[1] * world_size()
        real, imaginary = sum_with_grad(torch.stack([angles.cos().sum(1), angles.sin().sum(1)])) / count
        error = (real - gauss).square() + imaginary.square()
        return count * (error @ (weights * gauss)).mean()
