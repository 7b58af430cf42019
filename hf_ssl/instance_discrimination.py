"""What methods with a row per training image share: every image is a class, and its row of the bank is its weight."""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from . import distributed
from .joint_embedding import JointEmbeddingModel
from .losses import choice_loss, hit_rate, info_nce_logits, similarities
from .memory import ExampleBank
from .modeling import MultiViewConfig

_TINY = 1e-7  # as in the official code: no logarithm of 0


@strict
class InstanceConfig(MultiViewConfig):
    """num_examples: N, how many training images there are; ``hf-ssl train`` counts them. projection_dim: d of a row.
    temperature: τ. nce_negatives: K rows drawn per step, uniform with replacement; 0 is a softmax over all N.
    criterion: "nce" tells each row alone from noise, "cross_entropy" the image's own row from the K others.
    partition: Z of nce; None estimates it from the first batch, as the official code does, and keeps it.
    bank_momentum: of an image's old row when a new feature comes."""

    num_examples: int | None = None
    projection_dim: int = 128
    temperature: float | int = 0.07
    nce_negatives: int = 4096
    criterion: str = "nce"
    partition: float | int | None = None
    bank_momentum: float | int = 0.5
    limits = {"num_examples": "[1, inf)", "partition": "(0, inf)", "bank_momentum": "[0, 1]"}

    def __post_init__(self, **kwargs):
        if self.criterion not in ("nce", "cross_entropy"):
            raise ValueError(f"criterion must be nce or cross_entropy, got {self.criterion!r}")
        if self.nce_negatives < 0:
            raise ValueError(f"nce_negatives must be 0 (all rows) or more, got {self.nce_negatives}")
        super().__post_init__(**kwargs)


class InstanceModel(JointEmbeddingModel):
    """``discriminate`` compares features with the bank, ``remember`` brings them there for the next step.

    All rows of a step see the same K negatives, on every rank and in every micro-batch (the official code draws K for
    each image: K·B·d numbers to fetch instead of K·d). They may contain the positive, as there.
    """

    config: InstanceConfig
    needs_index = True
    compared: ClassVar[int | None] = 1

    def add_bank(self, scale: float | None = None) -> None:
        """Before ``post_init``. scale: see ``ExampleBank``. ValueError where the number of images is not known."""
        c = self.config
        if c.num_examples is None or c.num_examples < 2:
            raise ValueError(
                f"{self.paper.name} keeps a row for every training image: num_examples must say how many there are, "
                f"at least 2; it is {c.num_examples}"
            )
        self.bank = ExampleBank(c.num_examples, c.projection_dim, c.bank_momentum, scale)
        partition = float(c.partition or 0.0)  # 0: not yet estimated
        self.partition = nn.Buffer(torch.tensor(partition, dtype=torch.float32))

    def remember(self, index: Tensor, rows: Tensor) -> None:
        """Row numbers (B,) and unit features (B, d) of a training batch, for the next step."""
        if self.training:
            self.bank.push(index, rows)

    def discriminate(self, rows: Tensor, index: Tensor, negatives: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit rows (B, d) of the images ``index`` (B,) against the bank: mean loss, share whose own row ranks first.

        negatives: row numbers (K,), or (B, K) for each image its own; None draws them.
        """
        logits, target = self.logits(rows, index, negatives)
        if self.config.nce_negatives and self.config.criterion == "nce":
            loss = nce(self.probabilities(logits), self.bank.rows.shape[0]).mean()
            return loss, hit_rate(logits, target)
        return choice_loss(logits, target)

    def logits(self, rows: Tensor, index: Tensor, negatives: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Similarities / τ and the column of an image's own row: (B, N), or (B, 1 + K) with its own in front."""
        c, bank = self.config, self.bank
        if not c.nce_negatives:
            return similarities(rows, bank.rows, c.temperature), index
        if negatives is None:
            negatives = distributed.step_integers(self.step, len(bank.rows), c.nce_negatives)
        return info_nce_logits(rows, bank.at(index), bank.rows[negatives], c.temperature), torch.zeros_like(index)

    def probabilities(self, logits: Tensor) -> Tensor:
        """exp(logits) / Z, not differentiated through Z; the first training batch fixes Z."""
        scores = logits.exp()
        if self.config.partition is None:
            estimate = distributed.all_mean(scores.detach().mean() * self.bank.rows.shape[0])
            partition = torch.where(self.partition > 0, self.partition, estimate)
            if self.training:
                self.partition.copy_(partition)
        else:
            partition = self.partition.clone()
        return scores / partition

    def update_state(self) -> None:
        self.bank.advance()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.partition, float(self.config.partition or 0.0))


def nce(probabilities: Tensor, examples: int) -> Tensor:
    """Noise-contrastive estimation (NPID, eq. 7), per image: (B, 1 + K) -> (B,), the image's own in front.

    −log h(own) − Σ log(1 − h(noise)), where h = P / (P + K/N) and the noise is uniform over N ``examples``.
    """
    prior = (probabilities.shape[1] - 1) / examples
    own, noise = probabilities[:, 0], probabilities[:, 1:]
    is_noise = (prior / (noise + prior + _TINY)).log().sum(1)
    return -(own / (own + prior + _TINY)).log() - is_noise
