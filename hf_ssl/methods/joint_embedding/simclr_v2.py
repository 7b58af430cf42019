"""SimCLR v2: SimCLR with a deeper head, fine-tuned from that head's first layer (Chen et al. 2020, 2006.10029).

Teaches that with few labels the first layer of the projection head belongs to what is kept: ``fine_tuning_backbone``.
``memory_size`` adds the paper's queue of negatives from a momentum encoder; the released code has none, its details
are ours. The encoder's BatchNorm is averaged as its weights are (see ``hf_ssl.momentum_contrast``).
Siblings: SimCLR has two layers, no memory, and drops the head; MoCo has no negatives from the batch.
"""

from typing import Any

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ... import backbones
from ...losses import nt_xent
from ...memory import FeatureQueue
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class SimCLRv2Config(MultiViewConfig):
    """projection_dim, hidden_dim, num_layers: the head (hidden_dim None: the backbone's width; at least 2 layers).
    temperature: τ of NT-Xent. memory_size: further negatives, 0 or e.g. 65536. teacher_momentum: of the encoder that
    fills the memory, constant."""

    model_type = "ssl_simclr_v2"

    projection_dim: int = 128
    hidden_dim: int | None = None
    num_layers: int = 3
    temperature: float | int = 0.1
    memory_size: int = 0
    teacher_momentum: float | int = 0.999

    def __post_init__(self, **kwargs):
        if self.num_layers < 2:
            raise ValueError(f"num_layers must be at least 2, got {self.num_layers}: fine-tuning starts at the first")
        super().__post_init__(**kwargs)


class SimCLRv2ImageProcessor(SSLImageProcessor):
    """SimCLR's two random crops."""

    views = presets.SIMCLR


class FirstLayerBackbone(nn.Module):
    """A backbone and the first layer of its projection head, (B, C, H, W) -> (B, hidden), shaped as a native model is.

    The evaluation takes it for a model (``extract_features``, ``evaluate_backbone(..., baselines=False)``), and a
    linear layer on ``pooler_output`` makes a classifier to fine-tune. It shares its weights with the method.
    """

    def __init__(self, backbone: Any, layer: nn.Sequential):
        super().__init__()
        self.backbone, self.layer = backbone, layer

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        features = self.layer(backbones.features(self.backbone, pixel_values))
        return BaseModelOutputWithPooling(features[:, None], features)


class SimCLRv2ForPreTraining(MultiViewModel):
    """Backbone → three-layer projector → NT-Xent over the global batch, and over a memory where there is one."""

    config: SimCLRv2Config
    followed = ("backbone", "projector")
    paper = Paper(
        name="SimCLR v2",
        title="Big Self-Supervised Models are Strong Semi-Supervised Learners",
        arxiv="2006.10029",
        bibtex="chen2020simclrv2",
        authors="Chen, Ting and Kornblith, Simon and Swersky, Kevin and Norouzi, Mohammad and Hinton, Geoffrey",
        teaches="a deeper head, whose first layer is kept for fine-tuning on few labels",
    )
    processor_class = SimCLRv2ImageProcessor
    lr_scaling = ("sqrt", 1)  # the paper's .1 · √batch
    compares_images = "without others there are no negatives"
    teacher_buffers = True
    default_arguments = {
        "optim": "lars", "base_learning_rate": 0.1, "weight_decay": 1e-4, "warmup_steps": 0.05,
        "per_device_train_batch_size": 256, "num_train_epochs": 100,
    }  # fmt: skip

    def add_parts(self, config: SimCLRv2Config) -> None:
        self.projector = self.make_projector(config.num_layers, last_norm="scale", last_bias=False)
        if config.memory_size:
            self.queue = FeatureQueue(config.memory_size, config.projection_dim)
            self.add_teacher()

    def teacher_momentum(self, progress: float) -> float:
        return float(self.config.teacher_momentum)

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = self.project(self.projector, embeddings, len(pixel_values)).chunk(2)
        memory = self.queue.rows if self.config.memory_size else None
        loss, accuracy = nt_xent(first, second, self.config.temperature, memory=memory)
        if self.config.memory_size and self.training:
            for view in F.normalize(self.teach(pixel_values), dim=1).chunk(2):  # ranks are gathered view by view
                self.queue.push(view)
        return loss, {"contrastive_accuracy": accuracy}

    def update_state(self) -> None:
        if self.config.memory_size:
            self.queue.advance()

    def fine_tuning_backbone(self) -> FirstLayerBackbone:
        """The backbone with the head's first layer (linear, BatchNorm, ReLU), to train with labels (section 2)."""
        return FirstLayerBackbone(self.backbone, nn.Sequential(*list(self.projector)[:3]))
