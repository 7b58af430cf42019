"""MSN: a view without some of its patches matches the whole view's cluster (Assran et al. 2022, 2204.07141).

Teaches masking without reconstruction: dropped patches cost no time, and few labels go far afterwards.
Siblings: DINO matches an EMA teacher as well, but sharpens around a centre where MSN asks that all prototypes be used
equally often (me-max); PMSN asks for another frequency of each; iBOT and I-JEPA predict the masked patches themselves.
"""

import math
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...masked_siamese import MaskedSiameseConfig, MaskedSiameseModel
from ...modeling import Paper
from ...processing import SSLImageProcessor, presets


@strict
class MSNConfig(MaskedSiameseConfig):
    """prior_weight: λ of me-max. The targets go through Sinkhorn, as in the official configuration."""

    model_type = "ssl_msn"

    sinkhorn_iterations: int = 3


class MSNImageProcessor(SSLImageProcessor):
    """The teacher's view, a large anchor and ten focal ones (the official configuration)."""

    views: ClassVar = presets.MSN


class MSNForPreTraining(MaskedSiameseModel):
    """The prior is uniform: KL(mean prediction ‖ prior) is ln K less the mean prediction's entropy (me-max, eq. 1)."""

    config: MSNConfig
    paper = Paper(
        name="MSN",
        title="Masked Siamese Networks for Label-Efficient Learning",
        arxiv="2204.07141",
        bibtex="assran2022msn",
        family="joint_embedding",
        authors=(
            "Assran, Mahmoud and Caron, Mathilde and Misra, Ishan and Bojanowski, Piotr and Bordes, Florian"
            " and Vincent, Pascal and Joulin, Armand and Rabbat, Michael and Ballas, Nicolas"
        ),
        teaches="a view without some patches joins the cluster of the whole view",
    )
    processor_class = MSNImageProcessor
    # The official cosines aim at lr 1e-6 and decay .4 after 1.25 times the run: these are their values where it ends.
    # Its clip at 3 leaves the prototypes out; here they belong to the norm.
    default_arguments = {
        "optim": "adamw_torch_fused", "base_learning_rate": 1e-3, "min_learning_rate": 1e-4, "weight_decay": 0.04,
        "weight_decay_end": 0.37, "warmup_steps": 0.02, "max_grad_norm": 3.0, "per_device_train_batch_size": 64,
        "num_train_epochs": 800,
    }  # fmt: skip

    def log_prior(self) -> Tensor:
        return self.prototypes.new_full((self.config.out_dim,), -math.log(self.config.out_dim))
