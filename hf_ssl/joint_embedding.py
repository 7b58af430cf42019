"""What joint-embedding methods share: views through one backbone and its heads, and a teacher of the same parts."""

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import backbones, schedules
from .heads import MLPHead
from .modeling import MultiViewConfig, SSLModel, SSLOutput
from .momentum import make_teacher


class JointEmbeddingModel(SSLModel):
    """Embeds one view, trains on several: ``objective`` is all that a method with the usual inputs adds.

    compared: the views that the loss compares; None is two or more. encoded: those that the student embeds, all unless
    the others are its teacher's alone. A method with further inputs overrides ``forward``. Everything is view-major:
    rows 0 to B − 1 are the first view's.
    """

    config: MultiViewConfig
    compared: ClassVar[int | None] = 2
    encoded: ClassVar[slice] = slice(None)

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


class TeacherModel(JointEmbeddingModel):
    """A student that follows an EMA teacher: ``add_teacher`` copies the parts named in ``followed``.

    ``teach`` runs the first two of them, the backbone and its head. The config has ``teacher_momentum``; it rises to 1
    along half a cosine unless a method says otherwise.
    """

    followed: tuple[str, ...] = ("backbone", "projector")
    teacher_backbone: Any
    teacher_projector: Any

    def add_teacher(self) -> None:
        """After all heads are made, before ``post_init``: ``teacher_<part>`` for each part."""
        for part in self.followed:
            setattr(self, f"teacher_{part}", make_teacher(getattr(self, part)))

    def teachers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        for part in self.followed:
            yield getattr(self, part), getattr(self, f"teacher_{part}")

    def teacher_momentum(self, progress: float) -> float:
        config: Any = self.config
        return schedules.cosine(progress, config.teacher_momentum, 1.0)

    @torch.no_grad()
    def teach(self, views: Tensor) -> Tensor:
        """(B, V, C, H, W) -> (V·B, d) float32: what the teacher's backbone and head say of the views."""
        embeddings = self.encode(views, self.teacher_backbone)
        return self.project(getattr(self, f"teacher_{self.followed[1]}"), embeddings, len(views)).float()
