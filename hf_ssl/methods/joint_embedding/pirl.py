"""PIRL: the shuffled patches of an image have the features of the image (Misra & van der Maaten 2020, 1912.01991).

Teaches to be invariant to a pretext task's transformation (here a jigsaw) where pretext methods learn to predict it.
Siblings: instance discrimination is this without patches; jigsaw puzzles predict the order that PIRL ignores; SimCLR
compares two crops of the batch and needs neither bank nor patches.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...backbones import feature_dim
from ...heads import PatchesHead
from ...modeling import Paper, SSLOutput
from ...processing import SSLImageProcessor, presets
from .instdisc import InstDiscConfig, InstDiscForPreTraining


@strict
class PIRLConfig(InstDiscConfig):
    """nce_negatives: 32000 in the paper. patch_weight: λ of the patches' loss, the image's own has 1 − λ. num_patches:
    cells of the processor's grid. hidden_dim: None for linear heads; a width makes the image's and each patch's
    two-layer, as in PyContrast, which takes ``criterion="cross_entropy"`` and temperature .1 with them."""

    model_type = "ssl_pirl"

    nce_negatives: int = 32000
    patch_weight: float | int = 0.5
    num_patches: int = 9
    hidden_dim: int | None = None
    limits = {"num_patches": "[1, inf)"}

    def __post_init__(self, **kwargs):
        if not 0 <= self.patch_weight <= 1:
            raise ValueError(f"patch_weight must lie between 0 and 1, got {self.patch_weight}")
        super().__post_init__(**kwargs)


class PIRLImageProcessor(SSLImageProcessor):
    """A random crop, and nine patches from the cells of another, in random order, each with colours of its own."""

    views: ClassVar = [
        {"key": "pixel_values", "count": 1, "scale": [0.08, 1.0], **presets.HALF_COLOUR, "hue": 0.2, "jitter_p": 1.0},
        {**presets.JIGSAW, **presets.HALF_COLOUR, "hue": 0.2, "jitter_p": 1.0},
    ]


class PIRLForPreTraining(InstDiscForPreTraining):
    """Backbone → head for the image; for the patches a head each, side by side, then a linear layer; the bank learns
    from the image alone."""

    config: PIRLConfig
    paper = Paper(
        name="PIRL",
        title="Self-Supervised Learning of Pretext-Invariant Representations",
        arxiv="1912.01991",
        bibtex="misra2020pirl",
        authors="Misra, Ishan and van der Maaten, Laurens",
        teaches="shuffled patches of an image match the image",
    )
    processor_class = PIRLImageProcessor
    lr_scaling = ("linear", 256)
    default_arguments: ClassVar = {
        "optim": "sgd_momentum", "momentum": 0.9, "base_learning_rate": 0.03, "min_learning_rate": 1.2e-4,
        "weight_decay": 1e-4, "per_device_train_batch_size": 256, "num_train_epochs": 800,
    }  # fmt: skip

    def add_parts(self, config: PIRLConfig) -> None:
        layers = 1 if config.hidden_dim is None else 2
        self.projector = self.make_projector(layers, hidden_norm=False, hidden_bias=True)
        dim = feature_dim(self.backbone)
        self.patch_head = PatchesHead(dim, config.hidden_dim, config.projection_dim, config.num_patches)
        self.add_bank()

    def losses(
        self, pixel_values: Tensor, patch_pixel_values: Tensor | None = None, index: Tensor | None = None
    ) -> SSLOutput:
        """pixel_values: (B, 1, C, H, W), patch_pixel_values: (B, P, C, h, w), index: the images' row numbers (B,)."""
        self.check_views(pixel_values)
        index = self.check_index(index)
        patches = self.patch_head.check(patch_pixel_values, self.paper.name)
        embeddings = self.encode(pixel_values)
        rows = F.normalize(self.projector(embeddings).float(), dim=1)
        shuffled = F.normalize(self.patch_head(self.encode(patches)).float(), dim=1)
        own, accuracy = self.discriminate(rows, index)
        invariant, patch_accuracy = self.discriminate(shuffled, index)
        self.remember(index, rows)
        loss = torch.lerp(own, invariant, float(self.config.patch_weight))
        metrics = {
            "image_loss": own.detach(), "patch_loss": invariant.detach(), "instance_accuracy": accuracy,
            "patch_accuracy": patch_accuracy,
        }  # fmt: skip
        return SSLOutput(loss, embeddings, metrics)
