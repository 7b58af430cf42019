"""SimCLR: two views of an image agree, the other images of the batch are negatives (Chen et al. 2020, 2002.05709).

Teaches that strong augmentation, a projector and many negatives suffice; no teacher, no queue.
Siblings: MoCo takes its negatives from a queue and keeps a momentum encoder; BYOL and SimSiam do without negatives;
DINO compares distributions over prototypes under a centred teacher.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ... import distributed
from ...backbones import feature_dim, over_views
from ...heads import MLPHead
from ...modeling import MultiViewConfig, Paper, SSLModel, SSLOutput
from ...processing import SSLImageProcessor


@strict
class SimCLRConfig(MultiViewConfig):
    """projection_dim, hidden_dim: widths of the projector (hidden_dim None = the backbone's feature width).
    temperature: τ of NT-Xent (0.1 at batch 4096, 0.5 on CIFAR). num_layers: 2 in v1, 3 in v2. joint_batchnorm: the
    official code joins both views (and ranks) in BatchNorm; lightly's examples and PyTorch ports often do not."""

    model_type = "ssl_simclr"

    projection_dim: int = 128
    hidden_dim: int | None = None
    num_layers: int = 2
    temperature: float | int = 0.1

    def __post_init__(self, **kwargs):
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        super().__post_init__(**kwargs)


class SimCLRImageProcessor(SSLImageProcessor):
    """Two random crops: flip, colour jitter in random order, grayscale, blur (appendix A)."""

    views: ClassVar = [
        {
            "key": "pixel_values", "count": 2, "scale": [0.08, 1.0], "hflip": 0.5, "brightness": 0.8, "contrast": 0.8,
            "saturation": 0.8, "hue": 0.2, "jitter_p": 0.8, "grayscale_p": 0.2, "blur_p": 0.5, "blur_kernel": 0.1,
        }
    ]  # fmt: skip


class SimCLRForPreTraining(SSLModel):
    """Backbone → projector (hidden BatchNorm, last BatchNorm without shift) → NT-Xent over the global batch."""

    config: SimCLRConfig
    paper = Paper(
        name="SimCLR",
        title="A Simple Framework for Contrastive Learning of Visual Representations",
        arxiv="2002.05709",
        bibtex="chen2020simclr",
        family="joint_embedding",
        authors="Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey",
        teaches="two views of an image attract, all other images repel",
    )
    processor_class = SimCLRImageProcessor
    lr_scaling = ("linear", 256)
    default_arguments: ClassVar = {
        "optim": "lars", "base_learning_rate": 0.3, "weight_decay": 1e-4, "warmup_steps": 0.1,
        "per_device_train_batch_size": 256, "num_train_epochs": 100,
    }  # fmt: skip

    def __init__(self, config: SimCLRConfig):
        super().__init__(config)
        dim = feature_dim(self.backbone)
        hidden = config.hidden_dim or dim
        widths = [dim, *[hidden] * (config.num_layers - 1), config.projection_dim]
        self.projector = MLPHead(widths, last_norm="scale", last_bias=False)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> SSLOutput:
        """pixel_values: (B, 2, C, H, W) to train, (B, C, H, W) to embed."""
        if pixel_values.ndim == 4:
            return SSLOutput(embeddings=self.features(pixel_values))
        if pixel_values.shape[1] != 2:
            raise ValueError(f"SimCLR compares exactly 2 views per image, got {pixel_values.shape[1]}")
        joint = self.config.joint_batchnorm
        embeddings = over_views(self.features, pixel_values, joint)  # (2·B, D), view-major
        views = embeddings.chunk(2)
        first, second = self.projector(embeddings).chunk(2) if joint else (self.projector(view) for view in views)
        loss, accuracy = nt_xent(first, second, self.config.temperature)
        return SSLOutput(loss, embeddings, {"contrastive_accuracy": accuracy})


def nt_xent(first: Tensor, second: Tensor, temperature: float, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """NT-Xent (eq. 1) of the local anchors against the global batch.

    first, second: (B, D) projections of the two views, normalised here unless told not to. Returns the mean over the
    2·B local anchors (the official code returns the sum of the two per-view means: twice this value) and the share of
    anchors whose positive ranks first. The gather carries gradients: the mean over ranks is the single-process loss.
    """
    logits, positive = contrastive_logits(first, second, temperature, normalise)
    accuracy = (logits.detach().argmax(1) == positive).float().mean()
    return F.cross_entropy(logits, positive), accuracy


def contrastive_logits(
    first: Tensor, second: Tensor, temperature: float, normalise: bool = True
) -> tuple[Tensor, Tensor]:
    """Similarities / τ of the 2·B local anchors to the 2·W·B global keys, an anchor to itself at −∞: (2·B, 2·W·B).

    Rows and columns are view-major; also returns the column of each anchor's positive, (2·B,).
    """
    if len(first) * distributed.world_size() < 2:
        raise ValueError("NT-Xent has no negatives in a global batch of one image")
    anchors = torch.stack([first.float(), second.float()])  # (2, B, D)
    anchors = F.normalize(anchors, dim=-1) if normalise else anchors
    batch = anchors.shape[1]
    keys = torch.cat([distributed.gather_with_grad(view) for view in anchors])  # (2·W·B, D)
    with torch.autocast(first.device.type, enabled=False):  # similarities / τ need float32
        logits = anchors.flatten(0, 1) @ keys.T / temperature
    rows = torch.arange(batch, device=logits.device) + distributed.rank() * batch
    total = batch * distributed.world_size()
    itself, positive = torch.cat([rows, rows + total]), torch.cat([rows + total, rows])
    return logits.scatter(1, itself[:, None], float("-inf")), positive
