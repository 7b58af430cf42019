"""PMSN: MSN for images whose classes are not equally frequent (Assran et al. 2022, 2210.07277).

Teaches that an even use of all clusters is an assumption on the data, and how to state another one: a power law.
Siblings: MSN is the case of a uniform prior; SwAV and DINOv2 spread images evenly by Sinkhorn, which is that same
assumption and hence off here. No official code exists; lightly's PMSNLoss minimises KL(prior ‖ mean prediction), the
other direction, which is not MSN's me-max where the prior is uniform; this one, the paper's, is.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...modeling import Paper
from ...processing import SSLImageProcessor, presets
from .msn import MSNConfig, MSNForPreTraining


@strict
class PMSNConfig(MSNConfig):
    """exponent: τ of the prior, prototype k is to be used in proportion to k^−τ; 0 is MSN's uniform prior.
    sinkhorn_iterations: 0, for Sinkhorn would make the prototypes' use even. The rest: ``MSNConfig``."""

    model_type = "ssl_pmsn"

    sinkhorn_iterations: int = 0
    exponent: float | int = 0.25


class PMSNImageProcessor(SSLImageProcessor):
    """MSN's views."""

    views: ClassVar = presets.MSN


class PMSNForPreTraining(MSNForPreTraining):
    """The prior over the prototypes is a power law; the loss has KL(mean prediction ‖ prior), in this direction."""

    config: PMSNConfig
    paper = Paper(
        name="PMSN",
        title="The Hidden Uniform Cluster Prior in Self-Supervised Learning",
        arxiv="2210.07277",
        bibtex="assran2022pmsn",
        authors=(
            "Assran, Mahmoud and Balestriero, Randall and Duval, Quentin and Bordes, Florian and Misra, Ishan"
            " and Bojanowski, Piotr and Vincent, Pascal and Rabbat, Michael and Ballas, Nicolas"
        ),
        teaches="clusters follow the frequencies that a prior states, not even ones",
    )
    processor_class = PMSNImageProcessor

    def log_prior(self) -> Tensor:
        ranks = torch.arange(1, self.config.out_dim + 1, device=self.prototypes.device, dtype=torch.float32)
        return (-self.config.exponent * ranks.log()).log_softmax(0)
