"""Instance discrimination, NPID: tell every training image from all others (Wu et al. 2018, 1805.01978).

Teaches that classes of one image each, with a row of a memory bank as the class's weight, already bring like to like.
One view per image and step: its features are compared with those that earlier epochs left in the bank. The paper's
proximal term is not in the official code, and not here.
Siblings: PIRL draws a shuffled image's features to the same row; MoCo replaces the bank by a queue of fresh keys;
SimCLR by the batch, which needs no row numbers.
"""

from typing import ClassVar

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ...backbones import feature_dim
from ...instance_discrimination import InstanceConfig, InstanceModel
from ...modeling import Paper, SSLOutput
from ...processing import SSLImageProcessor, presets


@strict
class InstDiscConfig(InstanceConfig):
    """nce_negatives: 4096 in the paper; 0 is a softmax over all images, which is better where they are few. A later
    model of the authors takes 65536 with ``criterion="cross_entropy"``. temperature: .07, and .1 on CIFAR."""

    model_type = "ssl_instdisc"

    nce_negatives: int = 4096
    temperature: float | int = 0.07


class InstDiscImageProcessor(SSLImageProcessor):
    """One random crop: flip, colour jitter always and strong in hue, grayscale, no blur (the official code's)."""

    views: ClassVar = [
        {"key": "pixel_values", "count": 1, "scale": [0.2, 1.0], **presets.HALF_COLOUR, "hue": 0.4, "jitter_p": 1.0}
    ]


class InstDiscForPreTraining(InstanceModel):
    """Backbone → linear layer → unit vector, against a bank with a row per training image."""

    config: InstDiscConfig
    paper = Paper(
        name="Instance discrimination",
        title="Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
        arxiv="1805.01978",
        bibtex="wu2018instdisc",
        family="joint_embedding",
        authors="Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua",
        teaches="every image is a class of its own, remembered in a bank",
    )
    processor_class = InstDiscImageProcessor
    lr_scaling = ("linear", 256)  # the official .03 is for its batch of 256
    default_arguments: ClassVar = {  # the official code drops the rate by 10 at 120 and 160 epochs: here a cosine
        "optim": "sgd_momentum", "momentum": 0.9, "base_learning_rate": 0.03, "weight_decay": 1e-4,
        "per_device_train_batch_size": 256, "num_train_epochs": 200,
    }  # fmt: skip

    def __init__(self, config: InstDiscConfig):
        super().__init__(config)
        self.projector = nn.Linear(feature_dim(self.backbone), config.projection_dim)
        self.add_bank(scale=(3 / config.projection_dim) ** 0.5)
        self.post_init()

    def losses(self, pixel_values: Tensor, index: Tensor | None = None) -> SSLOutput:
        """pixel_values: (B, 1, C, H, W), with the images' row numbers, index (B,)."""
        self.check_views(pixel_values)
        index = self.check_index(index)
        embeddings = self.encode(pixel_values)
        rows = F.normalize(self.projector(embeddings).float(), dim=1)
        loss, accuracy = self.discriminate(rows, index)
        self.remember(index, rows)
        return SSLOutput(loss, embeddings, {"instance_accuracy": accuracy})
