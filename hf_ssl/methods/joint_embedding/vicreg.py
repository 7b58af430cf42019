"""VICReg: invariance between views, variance and covariance within each (Bardes et al. 2022, 2105.04906).

Teaches that a hinge on every dimension's variance prevents collapse and decorrelation prevents redundancy, each view
on its own: no negatives, no teacher, no normalised embeddings.
Siblings: Barlow Twins decorrelates across the views; VICRegL adds the same loss on matched places of the feature maps;
W-MSE whitens; LeJEPA asks for a Gaussian, of which variance and covariance are two moments.

Where code and paper differ: the official code takes the mean of the two variance terms and adds the two covariances
(the paper adds both). Here it is as in the code.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...losses import vicreg_sum, vicreg_terms
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class VICRegConfig(MultiViewConfig):
    """projection_dim, hidden_dim, num_layers: the expander (8192 three times). invariance_weight, variance_weight,
    covariance_weight: λ, μ and ν of eq. 6. joint_batchnorm: the official code passes the views one by one."""

    model_type = "ssl_vicreg"

    projection_dim: int = 8192
    hidden_dim: int = 8192
    num_layers: int = 3
    invariance_weight: float | int = 25.0
    variance_weight: float | int = 25.0
    covariance_weight: float | int = 1.0
    joint_batchnorm: bool = False


class VICRegImageProcessor(SSLImageProcessor):
    """BYOL's asymmetric pair (appendix C)."""

    views: ClassVar = presets.BYOL


class VICRegForPreTraining(MultiViewModel):
    """Backbone → expander → three terms; variance and covariance are those of the global batch."""

    config: VICRegConfig
    paper = Paper(
        name="VICReg",
        title="VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
        arxiv="2105.04906",
        bibtex="bardes2022vicreg",
        authors="Bardes, Adrien and Ponce, Jean and LeCun, Yann",
        teaches="views agree while every dimension varies and none repeats another",
    )
    processor_class = VICRegImageProcessor
    lr_scaling = ("linear", 256)
    compares_images = "variance and covariance are taken over the images of the batch"
    default_arguments: ClassVar = {
        "optim": "lars", "base_learning_rate": 0.3, "min_learning_rate": 3e-4, "weight_decay": 1e-6,
        "warmup_steps": 0.1, "per_device_train_batch_size": 256, "num_train_epochs": 100,
    }  # fmt: skip

    def add_parts(self, config: VICRegConfig) -> None:
        self.projector = self.make_projector(config.num_layers, hidden_bias=True, last_bias=False)

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = self.project(self.projector, embeddings, len(pixel_values)).chunk(2)
        terms = vicreg_terms(first, second)
        metrics = dict(zip(("invariance", "variance", "covariance"), terms, strict=True))
        return vicreg_sum(self.config, *terms), {name: term.detach() for name, term in metrics.items()}
