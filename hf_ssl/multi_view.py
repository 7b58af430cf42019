"""Several views of an image through one backbone and its heads: what joint-embedding methods share."""

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from . import backbones
from .heads import MLPHead
from .modeling import SSLConfig, SSLModel, SSLOutput


@strict
class MultiViewConfig(SSLConfig):
    """Base of methods that encode several views of an image in one step.

    joint_batchnorm: True computes BatchNorm's statistics over all views of one size together, in one pass; False over
    each view alone, in a pass of its own. Networks without BatchNorm (ViT) give the same either way, True is faster.
    Each method's default is what its authors' code does.
    """

    joint_batchnorm: bool = True
    limits = {
        "projection_dim": "[1, inf)", "hidden_dim": "[1, inf)", "num_layers": "[1, inf)", "temperature": "(0, inf)",
        "teacher_temperature": "(0, inf)", "teacher_momentum": "[0, 1]",
    }  # fmt: skip


class MultiViewModel(SSLModel):
    """Embeds one view, trains on several: ``objective`` is all that a method with the usual inputs adds.

    compared: the views that the loss compares; None is two or more. encoded: those that the student embeds, all unless
    the others are its teacher's alone. A method with further inputs overrides ``forward``. Everything is view-major:
    rows 0 to B − 1 are the first view's.
    """

    config: MultiViewConfig
    compared: ClassVar[int | None] = 2
    encoded: ClassVar[slice] = slice(None)
    projector: Any

    def losses(self, pixel_values: Tensor) -> SSLOutput:
        """pixel_values: (B, V, C, H, W)."""
        self.check_views(pixel_values)
        embeddings = self.encode(pixel_values[:, self.encoded])
        loss, metrics = self.objective(embeddings, pixel_values)
        return SSLOutput(loss, embeddings, metrics)

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(V·B, D) embeddings of the encoded among (B, V, C, H, W) views: the loss and what to log."""
        raise NotImplementedError

    def check_views(self, pixel_values: Tensor) -> None:
        """ValueError where the number of views is not what the loss compares."""
        views = pixel_values.shape[1]
        if views != self.compared if self.compared else views < 2:
            wanted = "exactly 1 view" if self.compared == 1 else f"exactly {self.compared} views"
            wanted = wanted if self.compared else "at least 2 views"
            raise ValueError(f"{self.paper.name} compares {wanted} per image, got {views}")

    def check_index(self, index: Tensor | None) -> Tensor:
        """ValueError where a training batch has no row numbers."""
        if index is None:
            raise ValueError(f"{self.paper.name} trains with the images' row numbers: pass index, (B,) int64")
        return index

    def encode(self, views: Tensor, backbone: Any = None) -> Tensor:
        """(B, V, C, H, W) -> (V·B, D), by the student unless another backbone is given."""
        encoder = partial(backbones.features, self.backbone if backbone is None else backbone)
        return backbones.over_views(encoder, views, self.config.joint_batchnorm)

    def encode_crops(self, large: Tensor, small: Tensor | None) -> list[Tensor]:
        """As ``encode``, crops of two sizes, or large ones alone: those of one size share one pass."""
        return [self.encode(crops) for crops in (large, small) if crops is not None]

    def unit_crops(self, large: Tensor, small: Tensor | None) -> tuple[Tensor, Tensor]:
        """Crops of two sizes -> unit vectors (V, B, d) of all after the projector, float32, large ones first; and the
        embeddings (V·B, D) of the large ones."""
        encoded, batch = self.encode_crops(large, small), len(large)
        rows = F.normalize(self.project(self.projector, torch.cat(encoded), batch).float(), dim=1)
        return rows.unflatten(0, (-1, batch)), encoded[0]

    def make_projector(self, layers: int = 2, **options: Any) -> MLPHead:
        """From the features to the config's ``projection_dim``, through ``hidden_dim`` (None: the features' width)."""
        config: Any = self.config
        dim = backbones.feature_dim(self.backbone)
        return MLPHead([dim, *[config.hidden_dim or dim] * (layers - 1), config.projection_dim], **options)

    def project(self, head: nn.Module, rows: Tensor, batch: int) -> Tensor:
        """(V·B, D) -> (V·B, d): BatchNorm in the head sees all views together, or each alone (joint_batchnorm)."""
        if self.config.joint_batchnorm:
            return head(rows)
        return torch.cat([head(view) for view in rows.split(batch)])

    @torch.no_grad()
    def teach(self, views: Tensor) -> Tensor:
        """(B, V, C, H, W) -> (V·B, d) float32, from the EMA teacher's backbone and head, the first two of
        ``followed``."""
        backbone, head = (getattr(self, f"teacher_{part}") for part in self.followed[:2])
        return self.project(head, self.encode(views, backbone), len(views)).float()
