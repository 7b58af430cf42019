"""SwAV: each crop predicts the cluster that another crop was assigned to (Caron et al. 2020, 2006.09882).

Teaches clustering online: assignments are computed on the batch, as equal shares (Sinkhorn), and swapped among views.
Siblings: DeepCluster v2 and SeLa v2 label the whole training set once per epoch instead; DINO takes its targets from
an EMA teacher's head, centred where SwAV balances; SimCLR compares the features themselves.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ... import distributed
from ...clustering import ClusterConfig, ClusterModel
from ...losses import dino_loss, target_entropies
from ...memory import FeatureQueue
from ...modeling import Paper
from ...processing import SSLImageProcessor, presets


@strict
class SwAVConfig(ClusterConfig):
    """epsilon, sinkhorn_iterations: smoothness and number of scalings of the assignment. queue_size: earlier images
    whose embeddings make up for a small batch in it, 0 for none (4096 images a batch need none). queue_start: share of
    the run before a full queue takes part. freeze_prototypes: share of the run before the prototypes train."""

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


class SwAVForPreTraining(ClusterModel):
    """One head of prototypes; the queue remembers the large crops' embeddings, not their scores, and is scored by the
    prototypes of today."""

    config: SwAVConfig
    processor_class = SwAVImageProcessor
    paper = Paper(
        name="SwAV",
        title="Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
        arxiv="2006.09882",
        bibtex="caron2020swav",
        family="joint_embedding",
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

    def __init__(self, config: SwAVConfig):
        super().__init__(config)
        width = config.assigned_crops * config.projection_dim
        self.queue = FeatureQueue(config.queue_size, width) if config.queue_size else None
        self.post_init()

    def learn(self, rows: Tensor, index: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Swapped prediction (eq. 1): mean over pairs of an assigned crop and another one."""
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

    @torch.no_grad()
    def update_state(self) -> None:
        super().update_state()
        if self.queue is not None:
            self.queue.advance()
