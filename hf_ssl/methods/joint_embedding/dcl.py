"""DCL: SimCLR whose positive is not among its own competitors (Yeh et al. 2022, 2110.06848).

Teaches that the positive in NT-Xent's denominator weakens the gradient of easy pairs: without it small batches and
short runs do well. ``weighted`` (DCLW) also lets hard pairs pull more. The loss may be negative.
Siblings: SimCLR, the same but for the denominator; NNCLR takes another positive; MoCo gets its negatives from a queue.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ... import distributed
from ...losses import contrastive_logits
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class DCLConfig(MultiViewConfig):
    """projection_dim, hidden_dim: widths of SimCLR's projector (hidden_dim None = the backbone's feature width).
    temperature: τ. weighted: DCLW, positives weighted by 2 − B · softmax(similarity / sigma) over the global batch."""

    model_type = "ssl_dcl"

    projection_dim: int = 128
    hidden_dim: int | None = None
    temperature: float | int = 0.1
    weighted: bool = False
    sigma: float | int = 0.5

    def __post_init__(self, **kwargs):
        if self.sigma <= 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}")
        super().__post_init__(**kwargs)


class DCLImageProcessor(SSLImageProcessor):
    """Two random crops: flip, colour jitter in random order, grayscale, blur (SimCLR's)."""

    views = presets.SIMCLR


class DCLForPreTraining(MultiViewModel):
    """Backbone → SimCLR's projector → decoupled contrastive loss over the global batch."""

    config: DCLConfig
    paper = Paper(
        name="DCL",
        title="Decoupled Contrastive Learning",
        arxiv="2110.06848",
        bibtex="yeh2022dcl",
        authors=(
            "Yeh, Chun-Hsiao and Hong, Cheng-Yao and Hsu, Yen-Chi and Liu, Tyng-Luh and Chen, Yubei and LeCun, Yann"
        ),
        teaches="SimCLR without the positive in the denominator",
    )
    processor_class = DCLImageProcessor
    lr_scaling = ("linear", 256)
    compares_images = "without others there are no negatives"
    default_arguments: ClassVar = {  # the paper's: SGD at .03 · batch/256 (memory)
        "optim": "sgd_momentum", "momentum": 0.9, "base_learning_rate": 0.03, "weight_decay": 1e-4,
        "per_device_train_batch_size": 256, "num_train_epochs": 200,
    }  # fmt: skip

    def add_parts(self, config: DCLConfig) -> None:
        self.projector = self.make_projector(last_norm="scale", last_bias=False)

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        first, second = self.project(self.projector, embeddings, len(pixel_values)).chunk(2)
        losses, accuracy = dcl(first, second, c.temperature, c.sigma if c.weighted else None)
        return losses.mean(), {"contrastive_accuracy": accuracy}


def dcl(first: Tensor, second: Tensor, temperature: float, sigma: float | None = None) -> tuple[Tensor, Tensor]:
    """−w · s⁺/τ + log Σ exp(s⁻/τ) of each of the 2·B local anchors: one sum over both views (eq. 6).

    first, second: (B, D) projections, normalised here; the negatives are the other images of the global batch.
    sigma: None is w = 1 (DCL), else w = 2 − B · softmax(s⁺/σ) over the global batch, not differentiated (DCLW). Also
    returns the share of anchors whose positive is nearer than every negative.
    """
    logits, column = contrastive_logits(first, second, temperature)
    positive = logits.gather(1, column[:, None]).squeeze(1)
    negatives = logits.scatter(1, column[:, None], float("-inf"))
    accuracy = (positive > negatives.max(1).values).float().mean()
    weight: Tensor | float = 1.0
    if sigma is not None:
        hardness = positive.detach()[: len(first)] * (temperature / sigma)  # s⁺/σ: the same for both views
        share = (hardness - distributed.gather_with_grad(hardness).logsumexp(0)).exp()
        weight = (2 - len(first) * distributed.world_size() * share).repeat(2)
    return torch.logsumexp(negatives, dim=1) - weight * positive, accuracy.detach()
