"""MoCo: a query finds its key in a queue of a momentum encoder's keys (He et al. 2020, 1911.05722; v2 2003.04297).

Teaches that negatives may outlive their batch where a slow encoder keeps them consistent: 65 536 of them at batch 256.
Version 2, the default, adds a two-layer head, blur and τ .2. Version 1: ``num_layers=1, temperature=.07`` and the view
fields ``hue=.4, jitter_p=1, blur_p=0``.
Siblings: InfoMin is this with stronger views; ReSSL asks for the teacher's similarities instead of one right key;
SimCLR takes its negatives from the batch; MoCo v3 drops the queue and adds a predictor; NNCLR keeps a queue to find
positives in.

BatchNorm. With statistics of the batch in the key encoder, a query and its key, normalised by the same images, carry
one signature, and older keys another: the task is solved without looking (moco#46, vissl#576). The paper encodes keys
in an order shuffled across GPUs, which needs several, thins the signature and does not remove it; synchronised
statistics make it worse. Here the key encoder normalises by an EMA of the query encoder's running statistics, as its
weights are an EMA (EMAN: Cai et al. 2021, 2101.08482): a key depends on its own image alone, so BatchNorm leaks
nothing, in one process or in many, with plain or synchronised statistics in the query encoder. What every momentum
encoder leaves is age: keys drift as it moves, and a fast one's can be told from older ones by that. Running statistics
need some hundred steps to settle: in a run of a few hundred ``key_batchnorm="batch"`` learns more, leak and all.
"""

from typing import ClassVar

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...losses import info_nce
from ...memory import FeatureQueue
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class MoCoConfig(MultiViewConfig):
    """projection_dim, hidden_dim, num_layers: the head, without BatchNorm (hidden_dim None: the backbone's width);
    num_layers is 2 in v2, 1 in v1. temperature: τ; .2 in v2, .07 in v1. queue_size: K, the number of older keys.
    teacher_momentum: of the key encoder, constant. key_batchnorm: "ema", or "batch" for the statistics of the keys'
    own batch (see above)."""

    model_type = "ssl_moco"

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


class MoCoImageProcessor(SSLImageProcessor):
    """Two random crops: flip, colour jitter, grayscale, blur (v2). Version 1: ``hue=.4, jitter_p=1, blur_p=0``."""

    views = presets.MOCO_V2


class MoCoForPreTraining(MultiViewModel):
    """Backbone → head → the first view's query against the second view's key and the queue; one direction, no more.

    The query encoder is published. The key encoder moves after the optimiser step, in the released code before the
    next keys: the same sequence.
    """

    config: MoCoConfig
    encoded: ClassVar = slice(0, 1)  # the second view is the key encoder's
    followed = ("backbone", "projector")
    paper = Paper(
        name="MoCo",
        title="Momentum Contrast for Unsupervised Visual Representation Learning",
        arxiv="1911.05722",
        bibtex="he2020moco",
        authors="He, Kaiming and Fan, Haoqi and Wu, Yuxin and Xie, Saining and Girshick, Ross",
        teaches="a view finds its image's key in a queue of older keys",
    )
    processor_class = MoCoImageProcessor
    lr_scaling = ("linear", 256)  # the paper's .03 is for its batch of 256
    default_arguments: ClassVar = {
        "optim": "sgd_momentum", "base_learning_rate": 0.03, "weight_decay": 1e-4, "per_device_train_batch_size": 256,
        "num_train_epochs": 200,
    }  # fmt: skip

    def add_parts(self, config: MoCoConfig) -> None:
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
        return float(self.config.teacher_momentum)  # constant

    def update_state(self) -> None:
        self.queue.advance()
