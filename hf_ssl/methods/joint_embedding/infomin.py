"""InfoMin: MoCo v2 with views that share less, and a jigsaw branch (Tian et al. 2020, 2005.10243).

Teaches that views should share what the task needs and nothing else: stronger colours, RandAugment, and nine shuffled
patches of the image that look for the same key. Branch and figures are those of the released code (PyContrast), whose
RandAugment comes between blur and grayscale, of magnitudes about 10; ours is FixMatch's and comes first.
Siblings: MoCo, without the branch and with milder views; PIRL has the patches look for a row of a memory bank.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...backbones import feature_dim
from ...heads import PatchesHead
from ...modeling import Paper, SSLOutput
from ...processing import SSLImageProcessor, presets
from .moco import MoCoConfig, MoCoForPreTraining


@strict
class InfoMinConfig(MoCoConfig):
    """temperature: .15. patch_weight: λ of the patches' loss, the view's own has 1 − λ. num_patches: cells of the
    processor's grid. The rest: ``MoCoConfig``."""

    model_type = "ssl_infomin"

    temperature: float | int = 0.15
    patch_weight: float | int = 0.5
    num_patches: int = 9
    limits = {"num_patches": "[1, inf)"}

    def __post_init__(self, **kwargs):
        if not 0 < self.patch_weight <= 1:
            raise ValueError(f"patch_weight must lie in (0, 1], got {self.patch_weight}: without patches use moco")
        super().__post_init__(**kwargs)


class InfoMinImageProcessor(SSLImageProcessor):
    """Two random crops in strong colours; nine patches from the cells of a third, shuffled, in its own colours."""

    views: ClassVar = [
        {
            "key": "pixel_values", "count": 2, "scale": [0.2, 1.0], "interpolation": "bilinear",
            **presets.STRONG_COLOUR, "blur_kernel": 0.1, "randaugment": 2, "randaugment_magnitude": 10,
        },
        {**presets.JIGSAW, "interpolation": "bilinear", "hflip": 0.5},
    ]  # fmt: skip


class InfoMinForPreTraining(MoCoForPreTraining):
    """As MoCo's model; the patches' joint query meets the same key and the same queue."""

    config: InfoMinConfig
    paper = Paper(
        name="InfoMin",
        title="What Makes for Good Views for Contrastive Learning?",
        arxiv="2005.10243",
        bibtex="tian2020infomin",
        authors=(
            "Tian, Yonglong and Sun, Chen and Poole, Ben and Krishnan, Dilip and Schmid, Cordelia and Isola, Phillip"
        ),
        teaches="strong views and shuffled patches find one key among older keys",
    )
    processor_class = InfoMinImageProcessor

    def add_parts(self, config: InfoMinConfig) -> None:  # type: ignore[override]
        super().add_parts(config)
        dim = feature_dim(self.backbone)
        self.patch_head = PatchesHead(dim, config.hidden_dim or dim, config.projection_dim, config.num_patches)

    def losses(self, pixel_values: Tensor, patch_pixel_values: Tensor | None = None) -> SSLOutput:
        """pixel_values: (B, 2, C, H, W), query view and key view, and patch_pixel_values: (B, P, C, h, w)."""
        self.check_views(pixel_values)
        cut = self.patch_head.check(patch_pixel_values, self.paper.name)
        keys = self.keys(pixel_values[:, 1:])
        patches = self.encode(cut)  # first: BatchNorm's last word is the whole view's
        jigsaw, patch_accuracy = self.contrast(self.patch_head(patches), keys)
        embeddings = self.encode(pixel_values[:, self.encoded])
        loss, accuracy = self.contrast(self.projector(embeddings), keys)
        metrics = {
            "view_loss": loss.detach(), "patch_loss": jigsaw.detach(), "contrastive_accuracy": accuracy,
            "patch_accuracy": patch_accuracy,
        }  # fmt: skip
        return SSLOutput(torch.lerp(loss, jigsaw, float(self.config.patch_weight)), embeddings, metrics)
