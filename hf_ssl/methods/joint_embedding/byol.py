"""BYOL: a student predicts what its EMA teacher says of the other view, no negatives (Grill et al. 2020, 2006.07733).

Teaches that a slow teacher and a predictor keep the answer "the same for all images" away, which the loss allows.
Siblings: SimSiam is BYOL without the teacher, on a stop-gradient alone; DINO matches distributions over prototypes
instead of vectors; MoCo v3 predicts as well, among negatives; TiCo replaces the predictor by a penalty on covariance.
As in the official code each view is normalised by its own batch statistics, and the teacher's BatchNorm runs in
training mode with statistics of its own. Biases that a BatchNorm cancels are left out.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...heads import MLPHead
from ...losses import negative_cosine, spread
from ...modeling import Paper
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class BYOLConfig(MultiViewConfig):
    """projection_dim, hidden_dim: widths of projector and predictor. teacher_momentum: at the start, then half a
    cosine to 1; .996 for 1000 epochs of ImageNet, .99 for 100 and 300, .97 for 40."""

    model_type = "ssl_byol"

    projection_dim: int = 256
    hidden_dim: int = 4096
    teacher_momentum: float | int = 0.99
    joint_batchnorm: bool = False


class BYOLImageProcessor(SSLImageProcessor):
    """Two random crops of unlike colours: one always blurred, one rarely, but solarised at times (appendix B)."""

    views = presets.BYOL


class BYOLForPreTraining(MultiViewModel):
    """Backbone → projector → predictor against the teacher's backbone → projector of the other view."""

    config: BYOLConfig
    followed = ("backbone", "projector")
    paper = Paper(
        name="BYOL",
        title="Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
        arxiv="2006.07733",
        bibtex="grill2020byol",
        authors=(
            "Grill, Jean-Bastien and Strub, Florian and Altché, Florent and Tallec, Corentin and Richemond, Pierre H."
            " and Buchatskaya, Elena and Doersch, Carl and Pires, Bernardo Avila and Guo, Zhaohan Daniel and"
            " Azar, Mohammad Gheshlaghi and Piot, Bilal and Kavukcuoglu, Koray and Munos, Rémi and Valko, Michal"
        ),
        teaches="one view predicts an EMA teacher's vector of the other",
    )
    processor_class = BYOLImageProcessor
    lr_scaling = ("linear", 256)
    default_arguments: ClassVar = {
        "optim": "lars", "base_learning_rate": 0.3, "weight_decay": 1e-6, "warmup_steps": 0.033,
        "per_device_train_batch_size": 256, "num_train_epochs": 300,
    }  # fmt: skip

    def add_parts(self, config: BYOLConfig) -> None:
        width = config.projection_dim
        self.projector = self.make_projector(last_bias=False)
        self.predictor = MLPHead([width, config.hidden_dim, width], last_bias=False)
        self.add_teacher()

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch = len(pixel_values)
        projections = self.project(self.projector, embeddings, batch)
        targets = self.teach(pixel_values)
        loss = byol_loss(self.project(self.predictor, projections, batch), targets)
        return loss, {"target_spread": spread(targets)}


def byol_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """‖p̂₁ − ẑ₂‖² + ‖p̂₂ − ẑ₁‖², mean over the batch: between 0 and 8, 4 where nothing agrees (eq. 2, symmetrised).

    predictions, targets: (2·B, d), view-major, not normalised.
    """
    return 4 + 4 * negative_cosine(predictions, targets.roll(len(targets) // 2, 0))
