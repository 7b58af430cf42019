"""FixMatch: a confident guess on a weak view is the label of a strong view (Sohn et al. 2020, 2001.07685).

Teaches how far a fixed confidence threshold and strong augmentation carry a few labels.
Siblings: FlexMatch, FreeMatch and SoftMatch adapt the threshold or weight by confidence; UDA sharpens the guess
instead of taking its class; Pseudo-Label has one view for both; Mean Teacher's guess comes from the EMA.
"""

from typing import ClassVar

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...modeling import Paper
from ...processing import SSLImageProcessor
from ...semi_supervised import DistributionAlignment, SemiSupervisedConfig, SemiSupervisedModel


@strict
class FixMatchConfig(SemiSupervisedConfig):
    """threshold: τ, the confidence from which a guess counts. temperature: of the targets' softmax; 0 is its limit,
    the one-hot guess of the paper (UDA: .4). The threshold never looks at sharpened guesses, as in the official code;
    a known PyTorch port sharpens first, so that more guesses pass. alignment_momentum: > 0 turns on distribution
    alignment, the paper's extension for very few labels; .99 to .999 suit."""

    model_type = "ssl_fixmatch"

    threshold: float | int = 0.95
    temperature: float | int = 0.0
    alignment_momentum: float | int = 0.0

    def __post_init__(self, **kwargs):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {self.threshold}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 <= self.alignment_momentum < 1:
            raise ValueError(f"alignment_momentum must lie in [0, 1), got {self.alignment_momentum}")
        super().__post_init__(**kwargs)


_WEAK = {"count": 1, "scale": None, "hflip": 0.5, "translate": 0.125}


class FixMatchImageProcessor(SSLImageProcessor):
    """Weak: flip and mirror-padded shift by up to 12.5 %. Strong: weak, then two RandAugment operations and Cutout."""

    views: ClassVar = [
        {"key": "pixel_values", **_WEAK},
        {"key": "weak_pixel_values", **_WEAK},
        {
            "key": "strong_pixel_values", **_WEAK, "randaugment": 2, "randaugment_magnitude": 10, "randaugment_p": 0.5,
            "cutout": 0.5,
        },
    ]  # fmt: skip


class FixMatchForPreTraining(SemiSupervisedModel):
    """Native classifier and its EMA; CE on labels + λ · CE of strong views against confident weak guesses.

    default_arguments are the paper's for CIFAR, but for the length (2^20 steps) and the backbone (Wide-ResNet-28-2).
    """

    config: FixMatchConfig
    processor_class = FixMatchImageProcessor
    paper = Paper(
        name="FixMatch",
        title="FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence",
        arxiv="2001.07685",
        bibtex="sohn2020fixmatch",
        authors=(
            "Sohn, Kihyuk and Berthelot, David and Li, Chun-Liang and Zhang, Zizhao and Carlini, Nicholas"
            " and Cubuk, Ekin D. and Kurakin, Alex and Zhang, Han and Raffel, Colin"
        ),
        teaches="a confident guess on a weak view labels the strong view",
    )
    default_backbone = "resnet-18"
    lr_scaling = ("none", 64)
    default_arguments: ClassVar = {
        "optim": "sgd_nesterov", "momentum": 0.9, "base_learning_rate": 0.03, "lr_scheduler_type": "cosine_7_16",
        "weight_decay": 5e-4, "warmup_steps": 0, "max_grad_norm": 0.0, "per_device_train_batch_size": 64,
        "num_train_epochs": 100,
    }  # fmt: skip

    def add_parts(self, config: FixMatchConfig) -> None:  # type: ignore[override]
        super().add_parts(config)
        self.alignment: DistributionAlignment | None = None
        if config.alignment_momentum:
            self.alignment = DistributionAlignment(self.backbone.config.num_labels, config.alignment_momentum)

    def supervised_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.alignment is not None and self.training:
            self.alignment.observe(labels)
        return super().supervised_loss(logits, labels)

    def update_state(self) -> None:
        if self.alignment is not None:
            self.alignment.update()

    def targets(self, logits: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weak logits (U, K) -> one-hot (or sharpened) guesses (U, K) and 1 where max p >= threshold, else 0 (U,)."""
        probabilities = logits.softmax(-1)
        if self.alignment is not None:
            probabilities = self.alignment(probabilities)
        confidence, guess = probabilities.max(-1)
        if self.config.temperature > 0:
            targets = (probabilities.log() / self.config.temperature).softmax(-1)
        else:
            targets = F.one_hot(guess, logits.shape[-1]).to(logits.dtype)
        return targets, (confidence >= self.config.threshold).to(logits.dtype)
