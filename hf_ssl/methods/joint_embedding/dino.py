"""DINO: a student matches its EMA teacher's centred, sharpened output across crops (Caron et al. 2021, 2104.14294).

Teaches self-distillation without labels or negatives; its ViTs segment objects in their attention.
Siblings: SimCLR needs negatives; BYOL predicts the teacher's vector where DINO matches a distribution over prototypes;
iBOT and DINOv2 add the same loss on masked patches; DINOv2/v3 replace the centre by Sinkhorn.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel

from ... import backbones, schedules
from ...heads import DINOHead
from ...joint_embedding import TeacherModel
from ...losses import dino_loss, target_entropies
from ...memory import Center
from ...modeling import MultiViewConfig, Paper, SSLOutput
from ...processing import SSLImageProcessor


@strict
class DINOConfig(MultiViewConfig):
    """out_dim: prototypes K. norm_last_layer: freeze the prototypes' gain at 1 (False is safe for small models only).
    teacher_temperature: constant by default; warms up linearly from warmup_teacher_temperature over the share
    teacher_temperature_warmup of the run. freeze_last_layer: share of the run before the last layer trains.
    interpolate_offset: 0.1 resizes position codes as the released code does; 0 as plain transformers does.
    joint_batchnorm: True as in the released code: crops of one size share statistics, all crops do in the head."""

    model_type = "ssl_dino"

    out_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_layers: int = 3
    use_bn_in_head: bool = False
    norm_last_layer: bool = True
    student_temperature: float | int = 0.1
    teacher_temperature: float | int = 0.04
    warmup_teacher_temperature: float | int = 0.04
    teacher_temperature_warmup: float | int = 0.3
    center_momentum: float | int = 0.9
    teacher_momentum: float | int = 0.996
    freeze_last_layer: float | int = 0.01
    interpolate_offset: float | int = 0.0


_COLOUR = {
    "hflip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_p": 0.8,
    "grayscale_p": 0.2, "interpolation": "bicubic",
}  # fmt: skip


class DINOImageProcessor(SSLImageProcessor):
    """Two large crops (blur always / rarely with solarisation) and eight small ones (section 3.2)."""

    views: ClassVar = [
        {"key": "pixel_values", "count": 1, "scale": [0.4, 1.0], **_COLOUR, "blur_p": 1.0},
        {"key": "pixel_values", "count": 1, "scale": [0.4, 1.0], **_COLOUR, "blur_p": 0.1, "solarize_p": 0.2},
        {"key": "local_pixel_values", "count": 8, "size": 96, "scale": [0.05, 0.4], **_COLOUR, "blur_p": 0.5},
    ]


class DINOForPreTraining(TeacherModel):
    """Student and EMA teacher, each backbone + head; the teacher sees the large crops only."""

    config: DINOConfig
    followed = ("backbone", "head")
    processor_class = DINOImageProcessor
    paper = Paper(
        name="DINO",
        title="Emerging Properties in Self-Supervised Vision Transformers",
        arxiv="2104.14294",
        bibtex="caron2021dino",
        family="joint_embedding",
        authors=(
            "Caron, Mathilde and Touvron, Hugo and Misra, Ishan and Jégou, Hervé and Mairal, Julien"
            " and Bojanowski, Piotr and Joulin, Armand"
        ),
        teaches="small crops predict what an EMA teacher says of large ones",
    )
    default_backbone = "vit-small"
    lr_scaling = ("linear", 256)
    default_arguments: ClassVar = {
        "optim": "adamw_torch_fused", "base_learning_rate": 5e-4, "min_learning_rate": 1e-6, "weight_decay": 0.04,
        "weight_decay_end": 0.4, "warmup_steps": 0.1, "max_grad_norm": 0.0, "clip_grad_per_tensor": 3.0,
        "per_device_train_batch_size": 64, "num_train_epochs": 100,
    }  # fmt: skip

    def __init__(self, config: DINOConfig):
        super().__init__(config)
        self.head = DINOHead(
            backbones.feature_dim(self.backbone), config.out_dim, config.hidden_dim, config.bottleneck_dim,
            config.num_layers, config.use_bn_in_head,
        )  # fmt: skip
        self.add_teacher()
        if config.interpolate_offset:
            for model in (self.backbone, self.teacher_backbone):
                backbones.set_position_offset(model, config.interpolate_offset)
        self.center = Center(config.out_dim)
        self.post_init()

    @property
    def export_backbone(self) -> PreTrainedModel:
        return self.teacher_backbone  # the teacher is the better model throughout training (section 5.1)

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        if self.config.norm_last_layer:
            yield self.head.last_layer.weight_g

    def before_optimizer_step(self, progress: float) -> None:
        if progress < self.config.freeze_last_layer:
            self.head.spare_prototypes()

    def teacher_temperature(self) -> Tensor:
        c = self.config
        return schedules.linear(
            self.progress, c.warmup_teacher_temperature, c.teacher_temperature, c.teacher_temperature_warmup
        )

    def forward(self, pixel_values: Tensor, local_pixel_values: Tensor | None = None) -> SSLOutput:
        """pixel_values: (B, 2, C, H, W) large crops, or (B, C, H, W) to embed; local_pixel_values: (B, V, C, h, w)."""
        if pixel_values.ndim == 4:
            return SSLOutput(embeddings=self.features(pixel_values))
        batch = len(pixel_values)
        crops = [pixel_values] if local_pixel_values is None else [pixel_values, local_pixel_values]
        encoded = [self.encode(views) for views in crops]  # crops of one size share one pass
        student = self.project(self.head, torch.cat(encoded), batch)
        loss, metrics = self.distil(student, self.teach(pixel_values), batch)
        return SSLOutput(loss, encoded[0], metrics)

    def distil(self, student: Tensor, teacher: Tensor, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Student (V·B, K) against raw teacher logits (2·B, K), crop-major: the loss and the targets' entropies."""
        logarithms = self.log_targets(teacher)
        if self.training:
            self.center.observe(teacher)
        targets = logarithms.exp()
        metrics = target_entropies(targets, logarithms)
        return dino_loss(student, targets, batch, self.config.student_temperature), metrics

    def log_targets(self, teacher: Tensor) -> Tensor:
        """Raw teacher logits (N, K) -> log probabilities: centred, then sharpened."""
        return F.log_softmax((teacher - self.center.value) / self.teacher_temperature(), dim=-1)

    def update_state(self) -> None:
        self.center.advance(self.config.center_momentum)
