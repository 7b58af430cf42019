"""DeepCluster v2: an image's crops predict its k-means cluster of the epoch before (Caron et al. 2020, 2006.09882).

Teaches alternation: cluster the embeddings of an epoch, learn the labels in the next. DeepCluster with what SwAV
brought: centroids themselves as classifier, multi-crop, an MLP head, several clusterings at once.
Siblings: SeLa v2 labels by a balanced assignment to learnt prototypes; SwAV assigns within the batch, with no bank.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...clustering import BankClusterModel, BankConfig, spherical_kmeans
from ...modeling import Paper
from ...processing import SSLImageProcessor, presets


@strict
class DeepClusterV2Config(BankConfig):
    """kmeans_iterations: steps of k-means per clustering. freeze_prototypes: 1, centroids are never trained."""

    model_type = "ssl_deepcluster_v2"

    kmeans_iterations: int = 10
    freeze_prototypes: float | int = 1.0
    limits = {"kmeans_iterations": "[1, inf)"}


class DeepClusterV2ImageProcessor(SSLImageProcessor):
    """Two large crops and six small ones, as SwAV's."""

    views = presets.SWAV


class DeepClusterV2ForPreTraining(BankClusterModel):
    """Spherical k-means per head; its centroids become the head's prototypes."""

    config: DeepClusterV2Config
    processor_class = DeepClusterV2ImageProcessor
    paper = Paper(
        name="DeepCluster v2",
        title="Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
        arxiv="2006.09882",
        bibtex="caron2020swav",
        family="joint_embedding",
        authors=(
            "Caron, Mathilde and Misra, Ishan and Mairal, Julien and Goyal, Priya and Bojanowski, Piotr"
            " and Joulin, Armand"
        ),
        teaches="crops predict the k-means cluster that the last epoch put their image in",
    )
    lr_scaling = ("linear", 256)  # the authors give absolute rates: 4.8 at 4096 images
    default_arguments: ClassVar = {
        "optim": "lars", "base_learning_rate": 0.3, "min_learning_rate": 3e-4, "weight_decay": 1e-6,
        "warmup_steps": 0.0125, "per_device_train_batch_size": 64, "num_train_epochs": 800,
    }  # fmt: skip

    def start_rows(self, head: int) -> Tensor:
        """(K, d): the images' embeddings that k-means of this head starts from."""
        return self.memory.sample(head, len(self.prototypes[head].weight))

    @torch.no_grad()
    def cluster(self, head: int) -> Tensor:
        start, iterations = self.start_rows(head), self.config.kmeans_iterations
        centroids, labels = spherical_kmeans(self.memory.view(head), start, iterations, self.memory.fresh)
        self.prototypes[head].weight.copy_(centroids)
        return labels
