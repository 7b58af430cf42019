"""DINOv2: DINO on crops, iBOT on masked patches, features pushed apart (Oquab et al. 2023, 2304.07193).

Teaches features that need no fine-tuning: the class token for images, the patch tokens for segmentation and depth.
The published ImageNet-1k recipe (one head, softmax centring) is the default. That for 142 million images is
``separate_heads, out_dim=patch_out_dim=131072, bottleneck_dim=384, centering="sinkhorn", layer_decay=1``.
Siblings: DINO has the first of the three losses, iBOT the first two; DINOv3 adds Gram anchoring and rotary positions.

Masks. The official code deals them out over one process's batch: half of its crops, by ratios stratified over them.
Here an image's masks depend on its row and epoch alone, so that one process, several, micro-batches and a resumed run
mask alike: half of the crops is one of each image's two.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ... import backbones, distributed, schedules
from ...heads import DINOHead, spare
from ...losses import dino_loss, koleo, patch_loss, target_entropies
from ...masks import crop_masks, masked_positions
from ...memory import Center
from ...modeling import Paper, SSLOutput
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets
from .dino import START_LEFT, warmed_up

Masks = Tensor | np.ndarray


@strict
class SSLDINOv2Config(MultiViewConfig):
    """Defaults are the ImageNet-1k recipe's (``vitl16_short``).

    out_dim, hidden_dim, bottleneck_dim, num_layers: the head, as ``DINOConfig``'s.
    separate_heads: patches have a head of their own, with the patch_* widths; else one head serves both.
    centering: of the teacher's logits, "softmax" (minus an EMA of their mean) or "sinkhorn" over the global batch.
    teacher_momentum: follows half a cosine to teacher_momentum_end.
    mask_share: of an image's large crops, so many are masked (.5: one of the two), each by a ratio of mask_ratio.
    patch_weight, koleo_weight, local_weight: of the patch loss, of KoLeo per large crop and of the small crops' part.
    layer_decay: learning rate per block from the end. patch_embedding_rate: the patch embedding's share beside that.
    student_temperature, teacher_temperature, center_momentum, freeze_last_layer: as ``DINOConfig``'s.
    """

    model_type = "ssl_dinov2"

    out_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_layers: int = 3
    separate_heads: bool = False
    patch_out_dim: int = 65536
    patch_hidden_dim: int = 2048
    patch_bottleneck_dim: int = 256
    centering: str = "softmax"
    sinkhorn_iterations: int = 3
    student_temperature: float | int = 0.1
    teacher_temperature: float | int = 0.07
    warmup_teacher_temperature: float | int = 0.04
    teacher_temperature_warmup: float | int = 0.3
    center_momentum: float | int = 0.9
    freeze_last_layer: float | int = 0.01
    teacher_momentum: float | int = 0.992
    teacher_momentum_end: float | int = 1.0
    mask_share: float | int = 0.5
    mask_ratio: list[float] | tuple[float, float] = (0.1, 0.5)
    patch_weight: float | int = 1.0
    koleo_weight: float | int = 0.1
    local_weight: float | int = 1.0
    layer_decay: float | int = 0.9
    patch_embedding_rate: float | int = 0.2
    limits = {
        "out_dim": "[1, inf)", "bottleneck_dim": "[1, inf)", "student_temperature": "(0, inf)",
        "warmup_teacher_temperature": "(0, inf)", "teacher_temperature_warmup": "[0, 1]", "center_momentum": "[0, 1]",
        "freeze_last_layer": "[0, 1]",
        "patch_out_dim": "[1, inf)", "patch_hidden_dim": "[1, inf)", "patch_bottleneck_dim": "[1, inf)",
        "teacher_momentum_end": "[0, 1]", "mask_share": "[0, 1]", "layer_decay": "(0, 1]",
    }  # fmt: skip

    def __post_init__(self, **kwargs):
        if self.centering not in ("softmax", "sinkhorn"):
            raise ValueError(f"centering must be softmax or sinkhorn, not {self.centering!r}")
        if len(self.mask_ratio) != 2 or not 0 < self.mask_ratio[0] <= self.mask_ratio[1] < 1:
            raise ValueError(f"mask_ratio must be [low, high] above 0 and below 1, not {self.mask_ratio}")
        super().__post_init__(**kwargs)


class SSLDINOv2ImageProcessor(SSLImageProcessor):
    """Two large crops (blur always / rarely with solarisation) and eight small ones, as DINO at other scales."""

    views = presets.DINOV2


class Tokens(NamedTuple):
    """What a backbone says of (B, V, C, H, W) views: cls (V·B, D), view-major; patches (B·V, N, D), image-major."""

    cls: Tensor
    patches: Tensor


class SSLDINOv2ForPreTraining(MultiViewModel):
    """Student and EMA teacher, each backbone + head(s). The teacher sees the two large crops whole; the student sees
    them with patches masked, and small crops.

    Loss = mean over pairs of different crops of the class tokens' cross-entropy (DINO)
    + patch_weight · the masked patches' (iBOT) + koleo_weight · Σ over the large crops KoLeo of the class tokens.
    """

    config: SSLDINOv2Config
    followed = ("backbone", "head")
    start_left = START_LEFT
    weight_norm: ClassVar[bool] = True  # of the prototypes; their gain trains
    host_inputs: ClassVar = ("masks",)
    teacher_head: DINOHead
    paper = Paper(
        name="DINOv2",
        title="DINOv2: Learning Robust Visual Features without Supervision",
        arxiv="2304.07193",
        bibtex="oquab2023dinov2",
        authors=(
            "Oquab, Maxime and Darcet, Timothée and Moutakanni, Théo and Vo, Huy and Szafraniec, Marc"
            " and Khalidov, Vasil and others"
        ),
        teaches="masked and small crops predict what an EMA teacher says of whole ones and of their patches",
    )
    processor_class = SSLDINOv2ImageProcessor
    default_backbone = "dinov2-small"
    lr_scaling = ("sqrt", 1024)
    default_arguments: ClassVar = {
        "optim": "adamw_torch_fused", "base_learning_rate": 4e-3, "min_learning_rate": 1e-6, "weight_decay": 0.04,
        "weight_decay_end": 0.4, "warmup_steps": 0.1, "max_grad_norm": 0.0, "clip_grad_per_module": 3.0,
        "per_device_train_batch_size": 64, "num_train_epochs": 100,
    }  # fmt: skip

    def add_parts(self, config: SSLDINOv2Config) -> None:
        self.mask_token = None
        if backbones.make_hidable(self.backbone):
            self.mask_token = nn.Parameter(torch.zeros(1, 1, backbones.feature_dim(self.backbone)))
        self.head = self._make_head(config.out_dim, config.hidden_dim, config.bottleneck_dim)
        patch_out = config.out_dim
        if config.separate_heads:
            patch_out = config.patch_out_dim
            self.patch_head = self._make_head(patch_out, config.patch_hidden_dim, config.patch_bottleneck_dim)
            self.followed = (*self.followed, "patch_head")
        self.add_teacher()
        if config.centering == "softmax":
            self.center, self.patch_center = Center(config.out_dim), Center(patch_out)

    def _make_head(self, out_dim: int, hidden_dim: int, bottleneck_dim: int) -> DINOHead:
        width, layers = backbones.feature_dim(self.backbone), self.config.num_layers
        return DINOHead(width, out_dim, hidden_dim, bottleneck_dim, layers, weight_norm=self.weight_norm)

    def fewest_images(self) -> tuple[int, str]:
        if self.config.koleo_weight:
            return 2, "KoLeo spreads the images of the batch (koleo_weight)"
        if self.config.centering == "sinkhorn":
            return 2, "the prototypes are shared out equally among the images of the batch (centering)"
        return super().fewest_images()

    def teacher_temperature(self) -> Tensor:
        return warmed_up(self.config, self.progress)

    @property
    def average(self) -> PreTrainedModel:
        return self.teacher_backbone  # as DINO

    def before_optimizer_step(self, progress: float) -> None:
        if progress < self.config.freeze_last_layer:
            heads: Any = {self.head, self._patch_head("")}
            for head in heads:
                spare(head.last_layer)

    def teacher_momentum(self, progress: float) -> float:
        return schedules.cosine(progress, self.config.teacher_momentum, self.config.teacher_momentum_end)

    def learning_rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        return backbones.layer_rates(self.backbone, self.config.layer_decay, self.config.patch_embedding_rate)

    def losses(
        self, pixel_values: Tensor, local_pixel_values: Tensor | None = None, masks: Masks | None = None
    ) -> SSLOutput:
        """pixel_values: (B, 2, C, H, W) large crops; local_pixel_values: (B, V, C, h, w).

        masks: (B, 2, N) bool on the host, the patches hidden from the student, as ``row_inputs`` draws them with the
        views; from torch's own generator if None.
        """
        loss, student, metrics = self.distil(pixel_values, local_pixel_values, masks)
        return SSLOutput(loss, student.cls, metrics)

    def distil(
        self, pixel_values: Tensor, local_pixel_values: Tensor | None, masks: Masks | None
    ) -> tuple[Tensor, Tokens, dict[str, Tensor]]:
        """The loss, the student's tokens of the large crops, and what to log; arguments as ``forward`` takes them."""
        self.check_views(pixel_values)
        batch, device = len(pixel_values), pixel_values.device
        hidden = torch.as_tensor(self._draw_masks(pixel_values) if masks is None else masks).flatten(0, 1)
        places, weights = (t.to(device, non_blocking=True) for t in masked_positions(hidden))
        student = self.tokens(self.backbone, pixel_values, hidden.to(device, non_blocking=True))
        local = None if local_pixel_values is None else self.tokens(self.backbone, local_pixel_values).cls
        with torch.no_grad():
            teacher = self.tokens(self.teacher_backbone, pixel_values)
            targets = self.center_logits(self.teacher_head(teacher.cls), "center")
            patch_targets = self.center_logits(
                self._patch_head("teacher_")(teacher.patches.flatten(0, 1)[places]), "patch_center"
            )
        loss, metrics = self._match_crops(student.cls, local, targets, batch)
        guesses = self._patch_head("")(student.patches.flatten(0, 1)[places])
        patches = patch_loss(guesses, patch_targets, weights, 2 * batch, self.config.student_temperature)
        loss = loss + self.config.patch_weight * patches
        metrics["patch_loss"] = patches.detach()
        if self.config.koleo_weight:
            spread = torch.stack([koleo(view) for view in student.cls.split(batch)]).sum()
            loss = loss + self.config.koleo_weight * spread
            metrics["koleo_loss"] = spread.detach() / 2
        return loss, student, metrics | target_entropies(targets)

    def tokens(self, backbone: nn.Module, views: Tensor, masked: Tensor | None = None) -> Tokens:
        """(B, V, C, H, W), with mask tokens for the ``masked`` (B·V, N) patches."""
        cls, patches = backbones.class_and_patch_tokens(backbone, views.flatten(0, 1), masked, self.mask_token)
        return Tokens(cls.unflatten(0, views.shape[:2]).transpose(0, 1).flatten(0, 1), patches)

    def center_logits(self, logits: Tensor, center: str) -> Tensor:
        """The teacher's targets (M, K) from its logits; ``center`` names what remembers their mean."""
        temperature = self.teacher_temperature()
        if self.config.centering == "sinkhorn":
            return distributed.sinkhorn(logits.float() / temperature, 1.0, self.config.sinkhorn_iterations)
        remembered: Center = getattr(self, center)
        if self.training:
            remembered.observe(logits)
        return F.softmax((logits.float() - remembered.value) / temperature, dim=-1)

    def update_state(self) -> None:
        if self.config.centering == "softmax":
            for center in (self.center, self.patch_center):
                center.advance(self.config.center_momentum)

    def _match_crops(
        self, large: Tensor, small: Tensor | None, targets: Tensor, batch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """DINO's loss, in two parts that the number of their pairs weighs: large (2·B, D), small (V·B, D) or None."""
        temperature = self.config.student_temperature
        loss = dino_loss(self.head(large), targets, batch, temperature)
        metrics = {"global_loss": loss.detach()}
        if small is not None:
            pairs = 2 * len(small) // batch
            local = dino_loss(self.head(small), targets, batch, temperature, shared=False)
            metrics["local_loss"] = local.detach()
            loss = (2 * loss + self.config.local_weight * pairs * local) / (2 + pairs)
        return loss, metrics

    def _patch_head(self, whose: str) -> nn.Module:
        return getattr(self, f"{whose}{'patch_head' if self.config.separate_heads else 'head'}")

    def row_inputs(self) -> Callable[..., dict[str, np.ndarray]]:
        low, high = self.config.mask_ratio
        patch = backbones.patch_size(self.backbone.config)
        return partial(_draw_masks, patch=patch, share=self.config.mask_share, ratios=(low, high))

    def _draw_masks(self, views: Tensor) -> np.ndarray:
        """(B, V, N) bool, where the caller gives none."""
        rng = np.random.default_rng(int(torch.empty((), dtype=torch.int64, device="cpu").random_().numpy()))
        crop = np.empty((views.shape[1], *views.shape[-2:], 0), np.uint8)
        draw = self.row_inputs()
        return np.stack([draw(rng, {"pixel_values": crop})["masks"] for _ in range(len(views))])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.mask_token is not None:
            init.zeros_(self.mask_token)


def _draw_masks(
    rng: np.random.Generator,
    views: dict[str, np.ndarray],
    patch: int,
    share: float,
    ratios: tuple[float, float],
) -> dict[str, np.ndarray]:
    """Of one image's large crops (V, H, W, C)."""
    crops, height, width, _ = views["pixel_values"].shape
    return {"masks": crop_masks(rng, crops, (height // patch, width // patch), share, ratios)}
