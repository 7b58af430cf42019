"""SwAV: each crop predicts the cluster that another crop was assigned to (Caron et al. 2020, 2006.09882).

Teaches clustering online: assignments are computed on the batch, as equal shares (Sinkhorn), and swapped among views.
Siblings: DeepCluster v2 and SeLa v2 label the whole training set once per epoch instead; DINO takes its targets from
an EMA teacher's head, centred where SwAV balances; SimCLR compares the features themselves.
"""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ... import distributed
from ...heads import Prototypes, spare
from ...losses import dino_loss, target_entropies
from ...memory import FeatureQueue
from ...modeling import Paper, SSLOutput
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets

SHARED_OUT = "the prototypes are shared out equally among the images of the batch"


@strict
class ClusterConfig(MultiViewConfig):
    """What SwAV and the methods that label the whole training set have in common.

    projection_dim, hidden_dim: widths of the projector (hidden_dim None = the backbone's feature width).
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
class SwAVConfig(ClusterConfig):
    """epsilon, sinkhorn_iterations: smoothness and number of scalings of the assignment. queue_size: earlier images
    whose embeddings make up for a small batch in it, 0 for none (4096 images a batch need none). queue_start: share of
    the run before a full queue takes part. The rest: ``ClusterConfig``."""

    model_type = "ssl_swav"

    epsilon: float | int = 0.05
    sinkhorn_iterations: int = 3
    queue_size: int = 3840
    queue_start: float | int = 0.075
    freeze_prototypes: float | int = 0.005
    limits = {"epsilon": "(0, inf)", "queue_start": "[0, 1]"}


class SwAVImageProcessor(SSLImageProcessor):
    """Two large crops and six small ones (appendix A.3)."""

    views = presets.SWAV


class SwAVForPreTraining(MultiViewModel):
    """Backbone → projector → unit vectors → products with unit prototypes.

    The queue remembers the large crops' embeddings, not their scores, and is scored by the prototypes of today.
    """

    config: SwAVConfig
    compares_images = SHARED_OUT
    prototypes: Any  # nn.ModuleList types what it holds as Tensor | Module
    processor_class = SwAVImageProcessor
    paper = Paper(
        name="SwAV",
        title="Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
        arxiv="2006.09882",
        bibtex="caron2020swav",
        authors=(
            "Caron, Mathilde and Misra, Ishan and Mairal, Julien and Goyal, Priya and Bojanowski, Piotr"
            " and Joulin, Armand"
        ),
        teaches="each crop predicts the balanced cluster assignment of another",
    )
    lr_scaling = ("linear", 256)  # the authors give absolute rates: 0.6 at 256 images, 4.8 at 4096
    default_arguments: ClassVar = {  # of the 256-image run; LARS, unlike apex's LARC, leaves biases and norms unscaled
        "optim": "lars", "base_learning_rate": 0.6, "min_learning_rate": 6e-4, "weight_decay": 1e-6,
        "warmup_steps": 0, "per_device_train_batch_size": 64, "num_train_epochs": 200,
    }  # fmt: skip

    def add_parts(self, config: SwAVConfig) -> None:
        self.projector = self.make_projector()
        self.prototypes = nn.ModuleList([Prototypes(config.projection_dim, config.num_prototypes)])
        width = config.assigned_crops * config.projection_dim
        self.queue = FeatureQueue(config.queue_size, width) if config.queue_size else None

    def losses(self, pixel_values: Tensor, local_pixel_values: Tensor | None = None) -> SSLOutput:
        """pixel_values: (B, 2, C, H, W) large crops; local_pixel_values: (B, V, C, h, w)."""
        self.check_views(pixel_values)
        rows, embeddings = self.unit_crops(pixel_values, local_pixel_values)
        with torch.autocast(rows.device.type, enabled=False):  # similarities / τ need float32
            loss, metrics = self.learn(rows)
        return SSLOutput(loss, embeddings, metrics)

    def learn(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Unit vectors (V, B, d) of all crops, the large ones first: the swapped prediction's loss (eq. 1), mean over
        pairs of an assigned crop and another one, and what to log."""
        batch, large = rows.shape[1], rows.detach()[: self.config.assigned_crops]
        scores = self.prototypes[0](rows)  # (V, B, K)
        targets = self.assign(scores.detach()[: len(large)])
        if self.training and self.queue is not None:
            self.queue.push(large.transpose(0, 1).flatten(1))
        loss = dino_loss(scores.flatten(0, 1), targets.flatten(0, 1), batch, self.config.temperature)
        entropies = target_entropies(targets.flatten(0, 1))
        return loss, {
            "assignment_entropy": entropies["teacher_entropy"],
            "prototype_entropy": entropies["prototype_entropy"],
        }

    @torch.no_grad()
    def assign(self, scores: Tensor) -> Tensor:
        """(T, B, K) scores -> assignments that share each crop's prototypes equally among batch, ranks and queue."""
        c = self.config
        if self.queue is None:
            return torch.stack([distributed.sinkhorn(crop, c.epsilon, c.sinkhorn_iterations) for crop in scores])
        share = self.queue.rows[distributed.rank() :: distributed.world_size()]  # every rank has the whole queue
        remembered = self.prototypes[0](share.unflatten(1, (len(scores), -1)).transpose(0, 1))
        ready = (self.queue.filled == len(self.queue.rows)) & (self.progress >= c.queue_start)
        everything = torch.cat([scores, remembered.masked_fill(~ready, float("-inf"))], dim=1)
        found = [distributed.sinkhorn(crop, c.epsilon, c.sinkhorn_iterations) for crop in everything]
        return torch.stack(found)[:, : scores.shape[1]]

    def before_optimizer_step(self, progress: float) -> None:
        if progress < self.config.freeze_prototypes:
            spare(self.prototypes)

    def update_state(self) -> None:
        self.prototypes[0].normalise()
        if self.queue is not None:
            self.queue.advance()
