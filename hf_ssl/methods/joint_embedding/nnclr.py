"""NNCLR: an image's positive is its nearest neighbour among earlier images (Dwibedi et al. 2021, 2104.14548).

Teaches that a neighbour from a queue of features is a positive richer than any augmentation of the image itself.
The loss is the paper's: neighbours of one view against the predictions of the other, no other negatives, both ways
averaged (lightly adds the negatives of NT-Xent). Neighbours are looked up before the queue moves.
Siblings: SimCLR's positive is the other view; MoCo's queue holds negatives; BYOL's predictor without any negatives.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ... import distributed
from ...heads import MLPHead
from ...losses import choice_loss, similarities
from ...memory import FeatureQueue
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class NNCLRConfig(MultiViewConfig):
    """projection_dim, hidden_dim: of the three-layer projector. predictor_hidden_dim: of the two-layer predictor.
    queue_size: the support set, 98304 in the paper (memory). temperature: τ. joint_batchnorm: False as in the peers'
    code (the authors published none)."""

    model_type = "ssl_nnclr"

    projection_dim: int = 256
    hidden_dim: int = 2048
    predictor_hidden_dim: int = 4096
    queue_size: int = 98304
    temperature: float | int = 0.1
    joint_batchnorm: bool = False
    limits = {"predictor_hidden_dim": "[1, inf)", "queue_size": "[1, inf)"}


class NNCLRImageProcessor(SSLImageProcessor):
    """Two random crops: flip, colour jitter in random order, grayscale, blur (SimCLR's)."""

    views = presets.SIMCLR


class NNCLRForPreTraining(MultiViewModel):
    """Backbone → projector → nearest neighbours in the queue, matched by the other view's predictor output."""

    config: NNCLRConfig
    paper = Paper(
        name="NNCLR",
        title="With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual Representations",
        arxiv="2104.14548",
        bibtex="dwibedi2021nnclr",
        authors=(
            "Dwibedi, Debidatta and Aytar, Yusuf and Tompson, Jonathan and Sermanet, Pierre and Zisserman, Andrew"
        ),
        teaches="a view predicts the nearest neighbour of the other view",
    )
    processor_class = NNCLRImageProcessor
    lr_scaling = ("linear", 256)
    compares_images = "without others there are no negatives"
    default_arguments: ClassVar = {
        "optim": "lars", "base_learning_rate": 0.3, "weight_decay": 1e-6, "warmup_steps": 0.01,
        "per_device_train_batch_size": 256, "num_train_epochs": 1000,
    }  # fmt: skip

    def add_parts(self, config: NNCLRConfig) -> None:
        c = config
        self.projector = self.make_projector(3, last_norm="affine", last_bias=False)
        self.predictor = MLPHead([c.projection_dim, c.predictor_hidden_dim, c.projection_dim])
        self.queue = FeatureQueue(c.queue_size, c.projection_dim)

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch = len(pixel_values)
        projected = self.project(self.projector, embeddings, batch)
        predicted = self.project(self.predictor, projected, batch)
        return self.compare(projected, predicted)

    def compare(self, projected: Tensor, predicted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(2·B, d) projections and predictions, view-major: loss and metrics; the first view joins the queue."""
        first, second = F.normalize(projected.detach().float(), dim=1).chunk(2)
        places = [nearest(rows, self.queue.rows) for rows in (first, second)]
        neighbours = [self.queue.rows[place] for place in places]
        temperature = self.config.temperature
        there, accuracy = neighbour_nce(neighbours[0], predicted.chunk(2)[1], temperature)
        back, _ = neighbour_nce(neighbours[1], predicted.chunk(2)[0], temperature)
        if self.training:
            self.queue.push(first)
        return (there + back) / 2, {
            "contrastive_accuracy": accuracy,
            "neighbour_similarity": (first * neighbours[0]).sum(1).mean(),
            "neighbour_agreement": (places[0] == places[1]).float().mean(),  # of the two views of an image
        }

    def update_state(self) -> None:
        self.queue.advance()


@torch.no_grad()
def nearest(rows: Tensor, support: Tensor) -> Tensor:
    """(B, d) and (Q, d) unit rows: for each of the first the place (B,) of the most similar among the second."""
    return similarities(rows, support).argmax(1)


def neighbour_nce(neighbours: Tensor, predictions: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Neighbours (B, d) of the local images against the predictions (B, d) of the global batch (eq. 3).

    Neighbours are unit rows without gradient, predictions are normalised here. Mean over the local neighbours, and the
    share of them nearest to their own image's prediction.
    """
    everyone = distributed.gather_with_grad(F.normalize(predictions.float(), dim=1))
    return choice_loss(similarities(neighbours, everyone, temperature), distributed.own_rows(neighbours))
