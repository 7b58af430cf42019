"""TiCo: a student agrees with its EMA teacher and avoids the common directions (Zhu et al. 2022, 2206.10698).

Teaches that an EMA of the embeddings' covariance is a memory bank of unlimited size: pushing an embedding away from
the covariance pushes it away from all earlier ones, at the cost of one d×d matrix.
Siblings: BYOL keeps collapse away by a predictor instead; MoCo keeps earlier embeddings one by one; Barlow Twins and
VICReg decorrelate channels within the batch. No official code exists and the paper was not at hand: C is a constant
in the gradient, as the paper's figure has it by lightly#1484; ρ and β are the paper's by its ports, which differ in ρ
(8 and 20); the optimiser is lightly's.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...distributed import all_mean
from ...losses import negative_cosine, spread
from ...memory import Center
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class TiCoConfig(MultiViewConfig):
    """projection_dim, hidden_dim: widths of the projector. covariance_weight: ρ. covariance_momentum: β of the
    covariance's EMA. teacher_momentum: at the start, then half a cosine to 1."""

    model_type = "ssl_tico"

    projection_dim: int = 256
    hidden_dim: int = 4096
    covariance_weight: float | int = 8.0
    covariance_momentum: float | int = 0.9
    teacher_momentum: float | int = 0.99
    limits = {"covariance_momentum": "[0, 1]"}


class TiCoImageProcessor(SSLImageProcessor):
    """BYOL's views: the first is the student's, the second the teacher's."""

    views = presets.BYOL


class TiCoForPreTraining(MultiViewModel):
    """Backbone → projector, unit vectors: agreement with the teacher's of the other view, contrast to C."""

    config: TiCoConfig
    followed = ("backbone", "projector")
    encoded = slice(0, 1)  # the second view is the teacher's
    paper = Paper(
        name="TiCo",
        title=(
            "TiCo: Transformation Invariance and Covariance Contrast for Self-Supervised Visual"
            " Representation Learning"
        ),
        arxiv="2206.10698",
        bibtex="zhu2022tico",
        authors=(
            "Zhu, Jiachen and Moraes, Rafael M. and Karakulak, Serkan and Sobol, Vlad and Canziani, Alfredo"
            " and LeCun, Yann"
        ),
        teaches="views agree with a teacher, embeddings avoid the directions that all images share",
    )
    processor_class = TiCoImageProcessor
    lr_scaling = ("linear", 256)
    default_arguments: ClassVar = {
        "optim": "lars", "base_learning_rate": 0.2, "weight_decay": 1.5e-6, "warmup_steps": 0.1,
        "per_device_train_batch_size": 256, "num_train_epochs": 100,
    }  # fmt: skip

    def add_parts(self, config: TiCoConfig) -> None:
        self.projector = self.make_projector()
        self.covariance = Center(config.projection_dim**2)  # C, row by row
        self.add_teacher()

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        projections = self.projector(embeddings)
        loss, agreement, contrast = self.contrast(projections, self.teach(pixel_values[:, 1:]))
        return loss, {"invariance": agreement, "covariance": contrast, "spread": spread(projections)}

    def contrast(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, d) twice -> −mean z₁·z₂ + ρ · mean z₁ᵀC z₁ (eq. 4), and its two means.

        C = β · (C of the last step) + (1 − β) · mean z₁z₁ᵀ of this (micro-)batch on all ranks.
        """
        beta = self.config.covariance_momentum
        with torch.autocast(student.device.type, enabled=False):  # d² sums of small products need float32
            unit = F.normalize(student.float(), dim=1)
            now = all_mean(unit.detach().T @ unit.detach() / len(unit))
            covariance = self.covariance.value.view_as(now).lerp(now, 1 - beta)
            contrast = ((unit @ covariance) * unit).sum(1).mean()
        if self.training:
            self.covariance.observe(now.view(1, -1))
        agreement = -negative_cosine(unit, teacher)
        return self.config.covariance_weight * contrast - agreement, agreement.detach(), contrast.detach()

    def update_state(self) -> None:
        self.covariance.advance(self.config.covariance_momentum)
