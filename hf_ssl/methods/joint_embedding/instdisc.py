"""Instance discrimination, NPID: tell every training image from all others (Wu et al. 2018, 1805.01978).

Teaches that classes of one image each, with a row of a memory bank as the class's weight, already bring like to like.
One view per image and step: its features are compared with those that earlier epochs left in the bank. The paper's
proximal term is not in the official code, and not here.
Siblings: PIRL draws a shuffled image's features to the same row; MoCo replaces the bank by a queue of fresh keys;
SimCLR by the batch, which needs no row numbers.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from ... import distributed
from ...backbones import feature_dim
from ...losses import choice_loss, hit_rate, info_nce_logits, similarities
from ...memory import ExampleBank
from ...modeling import Paper, SSLOutput
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets

_TINY = 1e-7  # as in the official code: no logarithm of 0


@strict
class InstDiscConfig(MultiViewConfig):
    """num_examples: N, how many training images there are; ``hf-ssl train`` counts them. projection_dim: d of a row.
    temperature: τ; .07, and .1 on CIFAR. nce_negatives: K rows drawn per step, uniform with replacement; 4096 in the
    paper; 0 is a softmax over all N images, which is better where they are few. criterion: "nce" tells each row alone
    from noise, "cross_entropy" the image's own row from the K others; a later model of the authors takes that with
    K = 65536.
    partition: Z of nce; None estimates it from the first batch, as the official code does, and keeps it.
    bank_momentum: of an image's old row when a new feature comes."""

    model_type = "ssl_instdisc"

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


class InstDiscImageProcessor(SSLImageProcessor):
    """One random crop: flip, colour jitter always and strong in hue, grayscale, no blur (the official code's)."""

    views: ClassVar = [
        {"key": "pixel_values", "count": 1, "scale": [0.2, 1.0], **presets.HALF_COLOUR, "hue": 0.4, "jitter_p": 1.0}
    ]


class InstDiscForPreTraining(MultiViewModel):
    """Backbone → linear layer → unit vector, against a bank with a row per training image: ``discriminate`` compares
    features with the bank, ``remember`` brings them there for the next step.

    All rows of a step see the same K negatives, on every rank and in every micro-batch (the official code draws K for
    each image: K·B·d numbers to fetch instead of K·d). They may contain the positive, as there.
    """

    config: InstDiscConfig
    needs_index = True
    compared: ClassVar[int | None] = 1
    paper = Paper(
        name="Instance discrimination",
        title="Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
        arxiv="1805.01978",
        bibtex="wu2018instdisc",
        authors="Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua",
        teaches="every image is a class of its own, remembered in a bank",
    )
    processor_class = InstDiscImageProcessor
    lr_scaling = ("linear", 256)  # the official .03 is for its batch of 256
    default_arguments: ClassVar = {  # the official code drops the rate by 10 at 120 and 160 epochs: here a cosine
        "optim": "sgd_momentum", "momentum": 0.9, "base_learning_rate": 0.03, "weight_decay": 1e-4,
        "per_device_train_batch_size": 256, "num_train_epochs": 200,
    }  # fmt: skip

    def add_parts(self, config: InstDiscConfig) -> None:
        self.projector = nn.Linear(feature_dim(self.backbone), config.projection_dim)
        self.add_bank(scale=(3 / config.projection_dim) ** 0.5)

    def losses(self, pixel_values: Tensor, index: Tensor | None = None) -> SSLOutput:
        """pixel_values: (B, 1, C, H, W), with the images' row numbers, index (B,)."""
        self.check_views(pixel_values)
        index = self.check_index(index)
        embeddings = self.encode(pixel_values)
        rows = F.normalize(self.projector(embeddings).float(), dim=1)
        loss, accuracy = self.discriminate(rows, index)
        self.remember(index, rows)
        return SSLOutput(loss, embeddings, {"instance_accuracy": accuracy})

    def add_bank(self, scale: float | None = None) -> None:
        """In ``add_parts``. scale: see ``ExampleBank``. ValueError where the number of images is not known."""
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
