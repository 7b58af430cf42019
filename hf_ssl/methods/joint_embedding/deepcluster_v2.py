"""DeepCluster v2: an image's crops predict its k-means cluster of the epoch before (Caron et al. 2020, 2006.09882).

Teaches alternation: cluster the embeddings of an epoch, learn the labels in the next. DeepCluster with what SwAV
brought: centroids themselves as classifier, multi-crop, an MLP head, several clusterings at once.
Siblings: SeLa v2 labels by a balanced assignment to learnt prototypes; SwAV assigns within the batch, with no bank.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from ... import distributed
from ...heads import Prototypes, spare
from ...memory import ExampleBank, HostCounter
from ...modeling import Paper, SSLOutput
from ...multi_view import MultiViewModel
from ...processing import SSLImageProcessor, presets
from .swav import SHARED_OUT, ClusterConfig

IGNORED = -100  # the label of an image that the last epoch did not show
UNKNOWN = -1  # the label of every image before the first clustering
_ROWS = 65536  # rows that k-means compares with all centroids at once


@strict
class DeepClusterV2Config(ClusterConfig):
    """heads: prototype layers, head h clusters crop h mod assigned_crops. num_examples: images in the training set,
    filled in from the data by ``hf-ssl train``. kmeans_iterations: steps of k-means per clustering.
    freeze_prototypes: 1, centroids are never trained. The rest: ``ClusterConfig``."""

    model_type = "ssl_deepcluster_v2"

    heads: int = 3
    num_examples: int | None = None
    kmeans_iterations: int = 10
    freeze_prototypes: float | int = 1.0
    limits = {"num_examples": "[1, inf)", "heads": "[1, inf)", "kmeans_iterations": "[1, inf)"}


class DeepClusterV2ImageProcessor(SSLImageProcessor):
    """Two large crops and six small ones, as SwAV's."""

    views = presets.SWAV


class DeepClusterV2ForPreTraining(MultiViewModel):
    """Hard labels from an epoch's whole bank: ``cluster`` finds them at its end by spherical k-means per head, whose
    centroids become the head's prototypes.

    The first epoch has no labels yet: an image's label is then its likeliest prototype under the batch's Sinkhorn
    assignment (the official code fills its bank by a pass over the data before training instead).
    """

    config: DeepClusterV2Config
    needs_index = True
    compares_images = SHARED_OUT
    prototypes: Any  # nn.ModuleList types what it holds as Tensor | Module
    processor_class = DeepClusterV2ImageProcessor
    paper = Paper(
        name="DeepCluster v2",
        title="Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
        arxiv="2006.09882",
        bibtex="caron2020swav",
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

    def add_parts(self, config: DeepClusterV2Config) -> None:
        self.projector = self.make_projector()
        heads = range(config.heads)
        self.prototypes = nn.ModuleList(Prototypes(config.projection_dim, config.num_prototypes) for _ in heads)
        if config.num_examples is None:
            raise ValueError(f"{self.paper.name} labels every training image: give num_examples, how many there are")
        if config.num_prototypes > config.num_examples:
            raise ValueError(
                f"{config.num_examples} images (num_examples) cannot fill {config.num_prototypes} clusters: lower "
                "num_prototypes"
            )
        self.memory = LabelBank(config.num_examples, config.assigned_crops, config.projection_dim, config.heads)

    def losses(
        self, pixel_values: Tensor, local_pixel_values: Tensor | None = None, index: Tensor | None = None
    ) -> SSLOutput:
        """pixel_values: (B, 2, C, H, W) large crops; local_pixel_values: (B, V, C, h, w); index: (B,) row numbers."""
        self.check_views(pixel_values)
        index = self.check_index(index)
        rows, embeddings = self.unit_crops(pixel_values, local_pixel_values)
        with torch.autocast(rows.device.type, enabled=False):  # similarities / τ need float32
            loss, metrics = self.learn(rows, index)
        return SSLOutput(loss, embeddings, metrics)

    def learn(self, rows: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Unit vectors (V, B, d) of all crops, the large ones first, of the images ``index``: cross-entropy of every
        crop's prediction with the image's label, mean over crops, labelled images and heads, and what to log."""
        views, total, right = len(rows), rows.new_zeros(()), rows.new_zeros(())
        known = self.memory.labels[:, index]
        for head, prototypes in enumerate(self.prototypes):
            scores = prototypes(rows)  # (V, B, K)
            online = distributed.sinkhorn(scores.detach()[head % self.config.assigned_crops], 0.05, 3).argmax(1)
            labels = online.where(known[head] == UNKNOWN, known[head]).expand(views, -1).flatten()
            scores = scores.flatten(0, 1) / self.config.temperature
            total = total + F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum")
            right = right + (scores.detach().argmax(1) == labels).float().sum()
        labelled = (known[0] != IGNORED).float().sum()
        if self.training:
            self.memory.push(index, rows.detach()[: self.config.assigned_crops])
        terms = distributed.all_mean(labelled).clamp(min=1) * views * len(self.prototypes)
        return total / terms, {"accuracy": right / terms, "labelled": labelled / len(index)}

    def before_optimizer_step(self, progress: float) -> None:
        if progress < self.config.freeze_prototypes:
            spare(self.prototypes)

    @torch.no_grad()
    def update_state(self) -> None:
        for head in self.prototypes:
            head.normalise()
        if self.memory.advance():
            self.memory.relabel([self.cluster(head) for head in range(len(self.prototypes))])

    def start_rows(self, head: int) -> Tensor:
        """(K, d): the images' embeddings that k-means of this head starts from."""
        return self.memory.sample(head, len(self.prototypes[head].weight))

    @torch.no_grad()
    def cluster(self, head: int) -> Tensor:
        """(examples,) int64 labels out of the bank; those of images that the epoch did not show do not matter."""
        start, iterations = self.start_rows(head), self.config.kmeans_iterations
        centroids, labels = spherical_kmeans(self.memory.view(head), start, iterations, self.memory.fresh)
        self.prototypes[head].weight.copy_(centroids)
        return labels


class LabelBank(HostCounter):
    """An epoch's embeddings, (examples, views, dim), and the labels, (heads, examples), that came of the last one.

    Rows change once per optimiser step, in ``advance``; all ranks hold the same.
    """

    counter = "clock"

    def __init__(self, examples: int, views: int, dim: int, heads: int):
        super().__init__()
        self.shape = (views, dim)
        self.bank = ExampleBank(examples, views * dim, momentum=0.0)
        self.labels = nn.Buffer(torch.full((heads, examples), UNKNOWN))
        self.seen = nn.Buffer(torch.zeros(examples, dtype=torch.uint8))  # 1: since the last clustering
        self.clock = nn.Buffer(torch.zeros(2, dtype=torch.int64))  # images since then, clusterings so far

    def push(self, index: Tensor, rows: Tensor) -> None:
        """Remember row numbers (B,) and unit vectors (views, B, dim) for ``advance``."""
        self.bank.push(index, rows.transpose(0, 1).flatten(1))

    @torch.no_grad()
    def advance(self) -> bool:
        """Take in what was pushed; True at the end of an epoch, when less than one more step of images is left."""
        index = self.bank.advance()
        self.seen.index_fill_(0, index, 1)
        images, clusterings = self.known()
        due = images + 2 * len(index) > len(self.seen)
        self.count_on(*([0, clusterings + 1] if due else [images + len(index), clusterings]))
        return due

    @property
    def fresh(self) -> Tensor:
        """(examples,) bool: the images seen since the last clustering."""
        return self.seen.bool()

    def view(self, head: int) -> Tensor:
        """(examples, dim): the unit vectors that the head clusters."""
        return F.normalize(self.bank.rows.unflatten(1, self.shape)[:, head % self.shape[0]], dim=1)

    def sample(self, head: int, count: int) -> Tensor:
        """(count, dim): the head's view of that many images of the epoch, the same on all ranks and on resume."""
        generator = torch.Generator().manual_seed(self.known()[1] * len(self.labels) + head)
        order = torch.randperm(len(self.seen), generator=generator).to(self.seen.device)
        order = order[torch.argsort(~self.fresh[order], stable=True)]  # those of the epoch first
        return self.view(head)[order[:count]]

    def relabel(self, labels: list[Tensor]) -> None:
        """Labels (examples,) of every head for the next epoch; images that this one did not show have none."""
        self.labels.copy_(torch.stack(labels).where(self.fresh, IGNORED))
        self.seen.zero_()

    def reset(self) -> None:
        init.constant_(self.labels, UNKNOWN)
        for buffer in (self.seen, self.clock):
            init.zeros_(buffer)


@torch.no_grad()
def spherical_kmeans(rows: Tensor, start: Tensor, iterations: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """k-means by the largest product: unit rows (N, d), centroids (K, d) to start with -> unit centroids, labels (N,).

    Rows where ``mask`` (N,) is False are labelled and move no centroid; an empty cluster keeps its centroid. Sums are
    matrix products, so ranks with the same rows agree to the bit.
    """
    centroids = start.clone()
    clusters = torch.arange(len(start), device=rows.device)
    for _ in range(iterations):
        sums = torch.zeros_like(centroids)
        for part, counts in zip(rows.split(_ROWS), mask.split(_ROWS), strict=True):
            member = ((part @ centroids.T).argmax(1)[:, None] == clusters) & counts[:, None]
            sums += member.to(rows.dtype).T @ part
        moved = F.normalize(sums, dim=1)
        centroids = moved.where(sums.any(1, keepdim=True), centroids)
    return centroids, torch.cat([(part @ centroids.T).argmax(1) for part in rows.split(_ROWS)])
