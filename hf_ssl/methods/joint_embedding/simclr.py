"""SimCLR: two views of an image agree, the other images of the batch are negatives (Chen et al. 2020, 2002.05709).

Teaches that strong augmentation, a projector and many negatives suffice; no teacher, no queue.
Siblings: MoCo takes its negatives from a queue and keeps a momentum encoder; BYOL and SimSiam do without negatives;
DINO compares distributions over prototypes under a centred teacher.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...losses import nt_xent
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


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


class SimCLRImageProcessor(SSLImageProcessor):
    """Two random crops: flip, colour jitter in random order, grayscale, blur (appendix A)."""

    views = presets.SIMCLR


class SimCLRForPreTraining(MultiViewModel):
    """Backbone → projector (hidden BatchNorm, last BatchNorm without shift) → NT-Xent over the global batch."""

    config: SimCLRConfig
    paper = Paper(
        name="SimCLR",
        title="A Simple Framework for Contrastive Learning of Visual Representations",
        arxiv="2002.05709",
        bibtex="chen2020simclr",
        authors="Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey",
        teaches="two views of an image attract, all other images repel",
    )
    processor_class = SimCLRImageProcessor
    lr_scaling = ("linear", 256)
    compares_images = "without others there are no negatives"
    default_arguments: ClassVar = {
        "optim": "lars", "base_learning_rate": 0.3, "weight_decay": 1e-4, "warmup_steps": 0.1,
        "per_device_train_batch_size": 256, "num_train_epochs": 100,
    }  # fmt: skip

    def add_parts(self, config: SimCLRConfig) -> None:
        self.projector = self.make_projector(config.num_layers, last_norm="scale", last_bias=False)

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = self.project(self.projector, embeddings, len(pixel_values)).chunk(2)
        loss, accuracy = nt_xent(first, second, self.config.temperature)
        return loss, {"contrastive_accuracy": accuracy}
