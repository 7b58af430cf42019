"""SimSiam: one view predicts the other's projection, through which no gradient flows (Chen & He 2020, 2011.10566).

Teaches that a stop-gradient is what keeps a plain Siamese network from collapse: no negatives, no teacher, no queue.
Siblings: BYOL adds an EMA teacher; SimCLR adds negatives and drops predictor and stop-gradient; Barlow Twins and
VICReg let gradients into both branches and decorrelate channels instead.
As in the official code each view has its own batch statistics and the predictor's learning rate stays constant. Of the
official training two things differ: the cosine falls with every step, not epoch, and norms and biases do not decay.
"""

from collections.abc import Iterator
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ...heads import MLPHead
from ...losses import negative_cosine, spread
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class SimSiamConfig(MultiViewConfig):
    """projection_dim: of the embedding that is predicted. hidden_dim: inside the projector (None = the backbone's
    feature width). num_layers: of the projector (2 on CIFAR). bottleneck_dim: inside the predictor.
    fix_predictor_rate: the predictor's learning rate does not follow the schedule (section 4.2)."""

    model_type = "ssl_simsiam"

    projection_dim: int = 2048
    hidden_dim: int | None = None
    num_layers: int = 3
    bottleneck_dim: int = 512
    fix_predictor_rate: bool = True
    joint_batchnorm: bool = False
    limits = {"bottleneck_dim": "[1, inf)"}


class SimSiamImageProcessor(SSLImageProcessor):
    """Two random crops, coloured and blurred as in MoCo v2 (section 3)."""

    views = presets.MOCO_V2


class SimSiamForPreTraining(MultiViewModel):
    """Backbone → projector (BatchNorm after every layer, the last without weights) → bottleneck predictor."""

    config: SimSiamConfig
    paper = Paper(
        name="SimSiam",
        title="Exploring Simple Siamese Representation Learning",
        arxiv="2011.10566",
        bibtex="chen2020simsiam",
        authors="Chen, Xinlei and He, Kaiming",
        teaches="one view predicts the other; stopping its gradient is all that prevents collapse",
    )
    processor_class = SimSiamImageProcessor
    lr_scaling = ("linear", 256)
    default_arguments: ClassVar = {
        "optim": "sgd_momentum", "momentum": 0.9, "base_learning_rate": 0.05, "weight_decay": 1e-4,
        "per_device_train_batch_size": 256, "num_train_epochs": 100,
    }  # fmt: skip

    def add_parts(self, config: SimSiamConfig) -> None:
        self.projector = self.make_projector(config.num_layers, last_norm="plain", last_bias=False)
        self.predictor = MLPHead([config.projection_dim, config.bottleneck_dim, config.projection_dim])

    def constant_rate_parameters(self) -> Iterator[nn.Parameter]:
        if self.config.fix_predictor_rate:
            yield from self.predictor.parameters()

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch = len(pixel_values)
        projections = self.project(self.projector, embeddings, batch)
        predictions = self.project(self.predictor, projections, batch)
        loss = negative_cosine(predictions, projections.detach().roll(batch, 0))  # each view's, of the other
        return loss, {"target_spread": spread(projections)}
