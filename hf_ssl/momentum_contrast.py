"""Momentum contrast (He et al. 2020, 1911.05722): a query's key among a queue of older keys; MoCo's and InfoMin's.

BatchNorm. With statistics of the batch in the key encoder, a query and its key, normalised by the same pictures, carry
one signature, and older keys another: the task is solved without looking (moco#46, vissl#576). The paper encodes keys
in an order shuffled across GPUs, which needs several, thins the signature and does not remove it; synchronised
statistics make it worse. Here the key encoder normalises by an EMA of the query encoder's running statistics, as its
weights are an EMA (EMAN: Cai et al. 2021, 2101.08482): a key depends on its own picture alone, so BatchNorm leaks
nothing, in one process or in many, with plain or synchronised statistics in the query encoder. What every momentum
encoder leaves is age: keys drift as it moves, and a fast one's can be told from older ones by that. Running statistics
need some hundred steps to settle: in a run of a few hundred ``key_batchnorm="batch"`` learns more, leak and all.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor

from .joint_embedding import TeacherModel
from .losses import info_nce
from .memory import FeatureQueue
from .modeling import MultiViewConfig


@strict
class MomentumContrastConfig(MultiViewConfig):
    """projection_dim, hidden_dim, num_layers: the head, without BatchNorm (hidden_dim None: the backbone's width).
    temperature: τ. queue_size: K, the number of older keys. teacher_momentum: of the key encoder, constant.
    key_batchnorm: "ema", or "batch" for the statistics of the keys' own batch (see above)."""

    model_type = "ssl_momentum_contrast"

    projection_dim: int = 128
    hidden_dim: int | None = None
    num_layers: int = 2
    temperature: float | int = 0.2
    queue_size: int = 65536
    teacher_momentum: float | int = 0.999
    key_batchnorm: str = "ema"

    def __post_init__(self, **kwargs):
        if self.queue_size < 1:
            raise ValueError(f"queue_size must be at least 1, got {self.queue_size}: without a queue use simclr")
        if self.key_batchnorm not in ("ema", "batch"):
            raise ValueError(f"key_batchnorm must be ema or batch, got {self.key_batchnorm!r}")
        super().__post_init__(**kwargs)


class MomentumContrastModel(TeacherModel):
    """Backbone → head → the first view's query against the second view's key and the queue; one direction, no more.

    The key encoder moves after the optimiser step, the released code's before the next keys: the same sequence.
    """

    config: MomentumContrastConfig
    encoded: ClassVar = slice(0, 1)  # the second view is the key encoder's

    def __init__(self, config: Any):
        super().__init__(config)
        self.teacher_buffers = config.key_batchnorm == "ema"  # what stands in for shuffling
        self.projector = self.make_projector(config.num_layers, hidden_norm=False, hidden_bias=True)
        self.queue = FeatureQueue(config.queue_size, config.projection_dim)
        self.add_teacher()

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, accuracy = self.contrast(self.projector(embeddings), self.keys(pixel_values[:, 1:]))
        return loss, {"contrastive_accuracy": accuracy}

    def keys(self, views: Tensor) -> Tensor:
        """(B, 1, C, H, W) -> keys (B, d), unit vectors; in training they join the queue after the optimiser step."""
        keys = F.normalize(self.teach(views), dim=1)
        if self.training:
            self.queue.push(keys)
        return keys

    def contrast(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, d) as they leave the head, keys (B, d): the loss and the share of own keys that rank first."""
        queries = F.normalize(queries.float(), dim=1)
        return info_nce(queries, keys, self.queue.rows, self.config.temperature)

    def teacher_momentum(self, progress: float) -> float:
        return float(self.config.teacher_momentum)

    def update_state(self) -> None:
        self.queue.advance()
