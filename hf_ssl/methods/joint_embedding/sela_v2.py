"""SeLa v2: an image's crops predict the label that a balanced assignment of all images gave it (Asano et al. 2020,
1911.05371; with SwAV's multi-crop, MLP head and temperature: Caron et al. 2020, 2006.09882).

Teaches self-labelling as optimal transport: labels are the classifier's own predictions, made equally frequent.
Siblings: SwAV does the same within a batch and keeps assignments soft; DeepCluster v2 labels by k-means, in clusters
of any size. There is no official code of v2: what is not in the papers follows DeepCluster v2's.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ... import distributed
from ...modeling import Paper
from ...processing import SSLImageProcessor, presets
from .deepcluster_v2 import DeepClusterV2ForPreTraining
from .swav import ClusterConfig


@strict
class SeLaV2Config(ClusterConfig):
    """epsilon, sinkhorn_iterations: smoothness (1/λ of SeLa, λ = 25) and number of scalings of the assignment.
    heads, num_examples: as ``DeepClusterV2Config``'s. The rest: ``ClusterConfig``."""

    model_type = "ssl_sela_v2"

    heads: int = 3
    num_examples: int | None = None
    epsilon: float | int = 0.04
    sinkhorn_iterations: int = 50
    limits = {"num_examples": "[1, inf)", "heads": "[1, inf)", "epsilon": "(0, inf)"}


class SeLaV2ImageProcessor(SSLImageProcessor):
    """Two large crops and six small ones, as SwAV's."""

    views = presets.SWAV


class SeLaV2ForPreTraining(DeepClusterV2ForPreTraining):
    """As DeepCluster v2's model, but ``cluster`` is Sinkhorn over the whole bank per head, against prototypes that the
    gradient trains."""

    config: SeLaV2Config
    processor_class = SeLaV2ImageProcessor
    paper = Paper(
        name="SeLa v2",
        title="Self-labelling via simultaneous clustering and representation learning",
        arxiv="1911.05371",
        bibtex="asano2020sela",
        authors="Asano, Yuki Markus and Rupprecht, Christian and Vedaldi, Andrea",
        teaches="crops predict a label that all images share out equally",
    )
    lr_scaling = ("linear", 256)  # as SwAV: 4.8 at 4096 images
    default_arguments: ClassVar = {
        "optim": "lars", "base_learning_rate": 0.3, "min_learning_rate": 3e-4, "weight_decay": 1e-6,
        "warmup_steps": 0.025, "per_device_train_batch_size": 64, "num_train_epochs": 400,
    }  # fmt: skip

    @torch.no_grad()
    def cluster(self, head: int) -> Tensor:
        rank, world = distributed.rank(), distributed.world_size()
        scores = self.prototypes[head](self.memory.view(head)[rank::world])
        scores = scores.masked_fill(~self.memory.fresh[rank::world, None], float("-inf"))
        found = distributed.sinkhorn(scores, self.config.epsilon, self.config.sinkhorn_iterations).argmax(1)
        labels = torch.zeros_like(self.memory.labels[head])
        labels[rank::world] = found  # every rank assigns its share of the bank
        return distributed.sum_with_grad(labels)
