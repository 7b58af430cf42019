"""What methods share that predict an image's cluster from each of its crops (SwAV, DeepCluster v2, SeLa v2).

Large and small crops through one backbone, a projector and unit-length prototypes; a bank that remembers an epoch's
embeddings and gives every image a label at its end; spherical k-means.
"""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from . import distributed
from .heads import Prototypes
from .joint_embedding import JointEmbeddingModel
from .memory import ExampleBank, HostCounter
from .modeling import MultiViewConfig, SSLOutput

IGNORED = -100  # the label of an image that the last epoch did not show
UNKNOWN = -1  # the label of every image before the first clustering
_ROWS = 65536  # rows that k-means compares with all centroids at once


@strict
class ClusterConfig(MultiViewConfig):
    """projection_dim, hidden_dim: widths of the projector (hidden_dim None = the backbone's feature width).
    num_prototypes: K of each head. temperature: τ of the predictions. freeze_prototypes: share of the run before the
    prototypes train. assigned_crops: clusters are those of the first so many crops; all crops predict them.
    joint_batchnorm: True as in the official code: crops of one size share statistics, all do in the projector."""

    projection_dim: int = 128
    hidden_dim: int | None = None
    num_prototypes: int = 3000
    temperature: float | int = 0.1
    freeze_prototypes: float | int = 0.00125
    assigned_crops: int = 2
    limits = {"num_prototypes": "[1, inf)", "freeze_prototypes": "[0, 1]"}

    def __post_init__(self, **kwargs):
        if self.assigned_crops not in (1, 2):
            raise ValueError(
                f"assigned_crops must be 1 or 2, for there are two large crops; got {self.assigned_crops}"
            )
        super().__post_init__(**kwargs)


@strict
class BankConfig(ClusterConfig):
    """heads: prototype layers, head h clusters crop h mod assigned_crops. num_examples: images in the training set,
    filled in from the data by ``hf-ssl train``."""

    heads: int = 3
    num_examples: int | None = None
    limits = {"num_examples": "[1, inf)", "heads": "[1, inf)"}


class ClusterModel(JointEmbeddingModel):
    """Backbone → projector → unit vectors → products with unit prototypes; a method says what to ``learn`` of them."""

    config: ClusterConfig
    compares_images = "the prototypes are shared out equally among the images of the batch"
    prototypes: Any  # nn.ModuleList types what it holds as Tensor | Module

    def __init__(self, config: ClusterConfig, heads: int = 1):
        super().__init__(config)
        self.projector = self.make_projector()
        self.prototypes = nn.ModuleList(Prototypes(config.projection_dim, config.num_prototypes) for _ in range(heads))

    def losses(
        self, pixel_values: Tensor, local_pixel_values: Tensor | None = None, index: Tensor | None = None
    ) -> SSLOutput:
        """pixel_values: (B, 2, C, H, W) large crops; local_pixel_values: (B, V, C, h, w);
        index: (B,) row numbers, where the method remembers images."""
        self.check_views(pixel_values)
        batch = len(pixel_values)
        encoded = self.encode_crops(pixel_values, local_pixel_values)
        rows = F.normalize(self.project(self.projector, torch.cat(encoded), batch).float(), dim=1)
        with torch.autocast(rows.device.type, enabled=False):  # similarities / τ need float32
            loss, metrics = self.learn(rows.unflatten(0, (-1, batch)), index)
        return SSLOutput(loss, encoded[0], metrics)

    def learn(self, rows: Tensor, index: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Unit vectors (V, B, d) of all crops, the large ones first: the loss and what to log."""
        raise NotImplementedError

    def before_optimizer_step(self, progress: float) -> None:
        if progress < self.config.freeze_prototypes:
            for parameter in self.prototypes.parameters():
                parameter.grad = None

    @torch.no_grad()
    def update_state(self) -> None:
        for head in self.prototypes:
            head.normalise()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Prototypes):
            init.copy_(module.weight, F.normalize(module.weight, dim=1))


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


class BankClusterModel(ClusterModel):
    """Hard labels from an epoch's whole bank: ``cluster`` finds them at the end of each.

    The first epoch has no labels yet: an image's label is then its likeliest prototype under the batch's Sinkhorn
    assignment (DeepCluster v2's official code fills its bank by a pass over the data before training instead).
    """

    config: BankConfig
    needs_index = True

    def __init__(self, config: BankConfig):
        super().__init__(config, config.heads)
        if config.num_examples is None:
            raise ValueError(f"{self.paper.name} labels every training image: give num_examples, how many there are")
        if config.num_prototypes > config.num_examples:
            raise ValueError(
                f"{config.num_examples} images (num_examples) cannot fill {config.num_prototypes} clusters: lower "
                "num_prototypes"
            )
        self.memory = LabelBank(config.num_examples, config.assigned_crops, config.projection_dim, config.heads)
        self.post_init()

    def learn(self, rows: Tensor, index: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of every crop's prediction with the image's label, mean over crops, labelled images, heads."""
        index = self.check_index(index)
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

    @torch.no_grad()
    def update_state(self) -> None:
        super().update_state()
        if self.memory.advance():
            self.memory.relabel([self.cluster(head) for head in range(len(self.prototypes))])

    def cluster(self, head: int) -> Tensor:
        """(examples,) int64 labels out of the bank; those of images that the epoch did not show do not matter."""
        raise NotImplementedError


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
