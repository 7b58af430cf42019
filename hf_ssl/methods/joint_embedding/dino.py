"""DINO: a student matches its EMA teacher's centred, sharpened output across crops (Caron et al. 2021, 2104.14294).

Teaches self-distillation without labels or negatives; its ViTs segment objects in their attention.
Siblings: SimCLR needs negatives; BYOL predicts the teacher's vector where DINO matches a distribution over prototypes;
iBOT and DINOv2 add the same loss on masked patches; DINOv2/v3 replace the centre by Sinkhorn.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel

from ... import schedules
from ...backbones import feature_dim, set_position_offset
from ...heads import DINOHead, spare
from ...losses import dino_loss, target_entropies
from ...memory import Center
from ...modeling import Paper, SSLOutput
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets

# With 60 % of its random start left the teacher led by 3 points of kNN-20 (250 steps, held-out emoji).
START_LEFT = 0.9


@strict
class DINOConfig(MultiViewConfig):
    """out_dim, hidden_dim, bottleneck_dim, num_layers: the head; out_dim is its prototypes K. teacher_temperature:
    reached linearly from warmup_teacher_temperature in the share teacher_temperature_warmup of the run; constant
    unless it is set. center_momentum: of the teacher's mean logits. freeze_last_layer: share of the run before the
    prototypes train. norm_last_layer: freeze the prototypes' gain at 1 (False is safe for small models only).
    interpolate_offset: 0.1 resizes position codes as the released code does; 0 as plain transformers does.
    joint_batchnorm: True as in the released code: crops of one size share statistics, all crops do in the head."""

    model_type = "ssl_dino"

    out_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_layers: int = 3
    student_temperature: float | int = 0.1
    teacher_temperature: float | int = 0.04
    warmup_teacher_temperature: float | int = 0.04
    teacher_temperature_warmup: float | int = 0.3
    center_momentum: float | int = 0.9
    teacher_momentum: float | int = 0.996
    freeze_last_layer: float | int = 0.01
    use_bn_in_head: bool = False
    norm_last_layer: bool = True
    interpolate_offset: float | int = 0.0
    limits = {
        "out_dim": "[1, inf)", "bottleneck_dim": "[1, inf)", "student_temperature": "(0, inf)",
        "warmup_teacher_temperature": "(0, inf)", "teacher_temperature_warmup": "[0, 1]", "center_momentum": "[0, 1]",
        "freeze_last_layer": "[0, 1]",
    }  # fmt: skip


class DINOImageProcessor(SSLImageProcessor):
    """Two large crops (blur always / rarely with solarisation) and eight small ones (section 3.2)."""

    views = presets.DINO


class DINOForPreTraining(MultiViewModel):
    """Student and EMA teacher, each backbone + head. The teacher sees the large crops only; it is published, as by the
    authors."""

    config: DINOConfig
    followed = ("backbone", "head")
    start_left = START_LEFT
    processor_class = DINOImageProcessor
    paper = Paper(
        name="DINO",
        title="Emerging Properties in Self-Supervised Vision Transformers",
        arxiv="2104.14294",
        bibtex="caron2021dino",
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

    def add_parts(self, config: DINOConfig) -> None:
        widths = config.out_dim, config.hidden_dim, config.bottleneck_dim, config.num_layers
        self.head = DINOHead(feature_dim(self.backbone), *widths, use_bn=config.use_bn_in_head)
        self.add_teacher()
        if config.interpolate_offset:
            for model in (self.backbone, self.teacher_backbone):
                set_position_offset(model, config.interpolate_offset)
        self.center = Center(config.out_dim)

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        if self.config.norm_last_layer:
            yield self.head.last_layer.weight_g

    def losses(self, pixel_values: Tensor, local_pixel_values: Tensor | None = None) -> SSLOutput:
        """pixel_values: (B, 2, C, H, W) large crops; local_pixel_values: (B, V, C, h, w)."""
        batch = len(pixel_values)
        encoded = self.encode_crops(pixel_values, local_pixel_values)
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

    def teacher_temperature(self) -> Tensor:
        return warmed_up(self.config, self.progress)

    @property
    def average(self) -> PreTrainedModel:
        return self.teacher_backbone  # the better model throughout training (section 5.1)

    def before_optimizer_step(self, progress: float) -> None:
        if progress < self.config.freeze_last_layer:
            spare(self.head.last_layer)

    def update_state(self) -> None:
        self.center.advance(self.config.center_momentum)


def warmed_up(c: Any, progress: Tensor) -> Tensor:
    """The teacher's temperature at ``progress`` (), as the config of DINO, or of a method that extends it, states."""
    return schedules.linear(
        progress, c.warmup_teacher_temperature, c.teacher_temperature, c.teacher_temperature_warmup
    )
