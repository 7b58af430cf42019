"""MoCo v3: each view predicts the momentum encoder's key of the other, in the batch (Chen et al. 2021, 2104.02057).

Teaches that contrastive learning trains ViTs too, once their patch projection stays as it was drawn: its gradients are
what makes such runs unstable (section 4.2). No queue: a batch of 4096 has negatives enough.
Siblings: MoCo has a queue, no predictor and one direction; BYOL is this without negatives; SimCLR has no momentum
encoder; DINO matches distributions.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from ... import backbones, distributed, heads
from ...losses import choice_loss, similarities
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class MoCoV3Config(MultiViewConfig):
    """projection_dim, hidden_dim: widths of projector and predictor. num_layers: the projector's; None is the paper's,
    3 on a ViT and 2 on a network without patches, whose predictor then ends without BatchNorm. temperature: τ, .2 for
    ViTs, 1 for ResNets. teacher_momentum: rises to 1 along half a cosine (.996 for 1000 epochs). freeze_patches: the
    patch projection never trains. fixed_positions: 2-D sin-cos codes in place of learned ones. joint_batchnorm: the
    released code passes the views one by one."""

    model_type = "ssl_mocov3"

    projection_dim: int = 256
    hidden_dim: int = 4096
    num_layers: int | None = None
    temperature: float | int = 0.2
    teacher_momentum: float | int = 0.99
    freeze_patches: bool = True
    fixed_positions: bool = True
    joint_batchnorm: bool = False


class MoCoV3ImageProcessor(SSLImageProcessor):
    """BYOL's pair of views, as in the paper for ViTs; for ResNets it takes ``scale=[.2, 1]``."""

    views = presets.BYOL


class MoCoV3ForPreTraining(MultiViewModel):
    """Backbone → projector → predictor against the momentum encoder's backbone → projector, in both directions."""

    config: MoCoV3Config
    followed = ("backbone", "projector")
    paper = Paper(
        name="MoCo v3",
        title="An Empirical Study of Training Self-Supervised Vision Transformers",
        arxiv="2104.02057",
        bibtex="chen2021mocov3",
        authors="Chen, Xinlei and Xie, Saining and He, Kaiming",
        teaches="each view predicts the momentum encoder's key of the other",
    )
    processor_class = MoCoV3ImageProcessor
    default_backbone = "vit-small"
    lr_scaling = ("linear", 256)
    compares_images = "without others there are no negatives"
    default_arguments = {
        "optim": "adamw_torch_fused", "base_learning_rate": 1.5e-4, "weight_decay": 0.1, "warmup_steps": 0.13,
        "max_grad_norm": 0.0, "per_device_train_batch_size": 256, "num_train_epochs": 300,
    }  # fmt: skip

    def add_parts(self, config: MoCoV3Config) -> None:
        patches = backbones.patch_projection(self.backbone) is not None
        layers, out = config.num_layers or (3 if patches else 2), config.projection_dim
        self.projector = self.make_projector(layers, last_norm="plain", last_bias=False)
        last = "plain" if patches else None
        self.predictor = heads.MLPHead([out, config.hidden_dim, out], last_norm=last, last_bias=False)
        self.add_teacher()

    def _positions(self) -> nn.Parameter | None:
        """The backbone's table of positions, (1, prefix + N, D); None where it has none, or is to learn it."""
        embeddings = getattr(self.backbone, "embeddings", None)
        return getattr(embeddings, "position_embeddings", None) if self.config.fixed_positions else None

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        projection, positions = backbones.patch_projection(self.backbone), self._positions()
        if projection is not None and self.config.freeze_patches:
            yield from projection.parameters()
        if positions is not None:
            yield positions

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch = len(pixel_values)
        projections = self.project(self.projector, embeddings, batch)
        queries = self.project(self.predictor, projections, batch).chunk(2)
        keys = [distributed.gather_with_grad(view) for view in self.teach(pixel_values).chunk(2)]
        own = distributed.rank() * batch
        first, hits = contrast(queries[0], keys[1], self.config.temperature, own)
        second, more_hits = contrast(queries[1], keys[0], self.config.temperature, own)
        return first + second, {"contrastive_accuracy": (hits + more_hits) / 2}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self and backbones.patch_projection(self.backbone) is not None:
            for part in self.backbone.modules():  # Xavier, q, k and v apart, as published
                heads.init_head(part, xavier=True)
            positions = self._positions()
            if positions is not None:
                patch = backbones.patch_size(self.backbone.config)
                height, width = backbones.image_size(self.backbone.config)
                prefix = backbones.num_prefix_tokens(self.backbone)
                grid = (height // patch, width // patch)
                init.copy_(positions, backbones.sincos_2d(positions.shape[-1], grid, prefix, row_first=True)[None])
        super()._init_weights(module)  # which ends with teacher := student


def contrast(queries: Tensor, keys: Tensor, temperature: float, own_key: int = 0) -> tuple[Tensor, Tensor]:
    """InfoNCE of the local queries (B, d) among the keys of all ranks (W·B, d), times 2τ (algorithm 1).

    own_key: where the first query's own key stands. Also returns the share of queries whose own key ranks first.
    """
    queries, keys = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
    own = torch.arange(len(queries), device=queries.device) + own_key
    loss, hits = choice_loss(similarities(queries, keys, temperature), own)
    return 2 * temperature * loss, hits
