"""DINOv3: DINOv2 with rotary positions, constant schedules and Gram anchoring (Siméoni et al. 2025, 2508.10104).

Teaches what DINOv2 does for as long as one likes: patch features stay local because their mutual similarities are held
to those of an earlier teacher. That is a second stage: ``hf-ssl train dinov3 --backbone RUN/ssl --gram_weight 2``, or
``from_pretrained("RUN/ssl", gram_weight=2.0)``, goes on with the heads and teachers of a first run.
The published 7B model: ``separate_heads, out_dim=262144, hidden_dim=8192, bottleneck_dim=512, patch_out_dim=98304,
patch_hidden_dim=4096, patch_bottleneck_dim=384``; its own LayerNorm for the small crops' class tokens is not here.
Siblings: DINOv2 has weight-normalised prototypes, a cosine for every schedule, and no Gram loss.
transformers' backbone scales its positions anew in every pass, by each process's own random numbers: two processes are
one, and two micro-batches, only where its config sets ``pos_embed_rescale`` to null.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ... import backbones, schedules
from ...losses import gram_loss
from ...modeling import Paper, SSLOutput
from ...momentum import Snapshot
from ...processing import SSLImageProcessor, presets
from .dinov2 import Masks, SSLDINOv2Config, SSLDINOv2ForPreTraining


@strict
class SSLDINOv3Config(SSLDINOv2Config):
    """gram_weight: of the Gram loss; 0, the first stage, has no Gram teacher. It is reached linearly in the share
    gram_warmup of the run. The Gram teacher is the EMA teacher of the start, taken anew every gram_every optimiser
    steps, gram_updates times at most. The published second stage: weight 2, learning rate 3e-5, teacher_momentum .999,
    local_weight .5. The rest: SSLDINOv2Config."""

    model_type = "ssl_dinov3"

    centering: str = "sinkhorn"
    separate_heads: bool = True
    teacher_momentum: float | int = 0.994
    teacher_momentum_end: float | int = 0.994
    teacher_temperature_warmup: float | int = 0.1
    layer_decay: float | int = 0.98
    gram_weight: float | int = 0.0
    gram_warmup: float | int = 0.01
    gram_every: int = 10000
    gram_updates: int = 3
    limits = {"gram_warmup": "[0, 1]", "gram_every": "[1, inf)"}


class SSLDINOv3ImageProcessor(SSLImageProcessor):
    """As DINOv2, larger and not mirrored. ``gram_pixel_values={"count": 2}`` adds the large crops once more for the
    Gram teacher, at 512 pixels and without colours; without them it sees what the teacher sees."""

    size: Any = {"height": 256, "width": 256}
    views = presets.DINOV3


class SSLDINOv3ForPreTraining(SSLDINOv2ForPreTraining):
    """``SSLDINOv2ForPreTraining`` with plain prototypes, plus gram_weight · the Gram loss of the large crops."""

    config: SSLDINOv3Config
    weight_norm = False
    paper = Paper(
        name="DINOv3",
        title="DINOv3",
        arxiv="2508.10104",
        bibtex="simeoni2025dinov3",
        authors=(
            "Siméoni, Oriane and Vo, Huy V. and Seitzer, Maximilian and Baldassarre, Federico and Oquab, Maxime"
            " and others"
        ),
        teaches="DINOv2's lesson without end: patch similarities are anchored to an earlier teacher's",
    )
    processor_class = SSLDINOv3ImageProcessor
    default_backbone = "dinov3-small"
    lr_scaling = ("sqrt", 1024)
    default_arguments: ClassVar = {  # 5e-5 at the published batch of 4096
        "optim": "adamw_torch_fused", "base_learning_rate": 2.5e-5, "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.04, "adam_beta2": 0.99, "warmup_steps": 0.1, "max_grad_norm": 0.0,
        "clip_grad_per_module": 30.0, "per_device_train_batch_size": 64, "num_train_epochs": 100,
    }  # fmt: skip

    def add_parts(self, config: SSLDINOv3Config) -> None:  # type: ignore[override]
        super().add_parts(config)
        if config.gram_weight:
            self.gram = Snapshot(self.teacher_backbone, config.gram_every, config.gram_updates)

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        if self.config.gram_weight:
            yield from self.gram.parameters()

    def update_state(self) -> None:
        super().update_state()
        if self.config.gram_weight:
            self.gram.advance(self.teacher_backbone)

    def losses(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        masks: Masks | None = None,
        gram_pixel_values: Tensor | None = None,
    ) -> SSLOutput:
        """As DINOv2; gram_pixel_values: (B, 2, C, H', W') large crops, of any size, as the Gram teacher sees them."""
        loss, student, metrics = self.distil(pixel_values, local_pixel_values, masks)
        if self.config.gram_weight:
            seen = pixel_values if gram_pixel_values is None else gram_pixel_values
            anchored = gram_loss(student.patches, self._gram_targets(seen, pixel_values.shape[-2:]))
            weight = schedules.linear(self.progress, 0.0, self.config.gram_weight, self.config.gram_warmup)
            loss = loss + weight * anchored
            metrics["gram_loss"] = anchored.detach()
        return SSLOutput(loss, student.cls, metrics)

    @torch.no_grad()
    def _gram_targets(self, views: Tensor, size: torch.Size) -> Tensor:
        """(B, V, C, H', W') -> (B·V, N, D), resized to the grid of ``size`` pixels."""
        patch = backbones.patch_size(self.backbone.config)
        patches = self.tokens(self.gram.model, views).patches
        if views.shape[-2:] == size:
            return patches
        maps = patches.transpose(1, 2).unflatten(2, [side // patch for side in views.shape[-2:]])
        grid = [side // patch for side in size]
        return F.interpolate(maps.float(), grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # A first stage's checkpoint fills all but the Gram teacher; ``self`` then counts as whole and is not visited.
        if self.config.gram_weight and module in (self, self.gram):
            self.gram.start(self.teacher_backbone)
