"""MSN: a view without some of its patches matches the whole view's cluster (Assran et al. 2022, 2204.07141).

Teaches masking without reconstruction: dropped patches cost no time, and few labels go far afterwards.
Siblings: DINO matches an EMA teacher as well, but sharpens around a centre where MSN asks that all prototypes be used
equally often (me-max); PMSN asks for another frequency of each; iBOT and I-JEPA predict the masked patches themselves.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ... import backbones, distributed, masks, schedules
from ...losses import similarities, target_entropies
from ...modeling import Paper, SSLOutput
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class MSNConfig(MultiViewConfig):
    """out_dim: prototypes K. patch_drop: share of patches that the large anchors lose (.15 for ViT-S/16, .3 for B, .7
    for L), the same places in all images of a step. temperature: of anchors and targets alike; targets are then raised
    to 1 / sharpening and, where sinkhorn_iterations is not 0, spread evenly over the prototypes. label_smoothing:
    share of every prediction that all prototypes get alike (0 in the official configuration). prior_weight: λ of
    KL(mean prediction ‖ prior), this direction and not its reverse (me-max where the prior is uniform).
    entropy_weight: of the anchors' own mean entropy. teacher_momentum: rises along a line that would reach 1 after
    1.25 times the run. joint_batchnorm: True as official: views of one size share statistics.
    """

    model_type = "ssl_msn"

    out_dim: int = 1024
    hidden_dim: int = 2048
    projection_dim: int = 256
    patch_drop: float | int = 0.15
    temperature: float | int = 0.1
    sharpening: float | int = 0.25
    sinkhorn_iterations: int = 3
    label_smoothing: float | int = 0.0
    prior_weight: float | int = 1.0
    entropy_weight: float | int = 0.0
    teacher_momentum: float | int = 0.996
    limits = {"out_dim": "[1, inf)", "label_smoothing": "[0, 1)"}

    def __post_init__(self, **kwargs):
        if not 0 <= self.patch_drop < 1:
            raise ValueError(f"patch_drop is a share from 0 up to but not including 1, got {self.patch_drop}")
        if self.sharpening <= 0:
            raise ValueError(f"sharpening must be positive, got {self.sharpening}")
        super().__post_init__(**kwargs)


class MSNImageProcessor(SSLImageProcessor):
    """The teacher's view, a large anchor and ten focal ones (the official configuration)."""

    views: ClassVar = presets.MSN


class MSNForPreTraining(MultiViewModel):
    """ViT and projector after its EMA teacher; the first large view is the teacher's, all others are anchors.

    The prior over the prototypes (``log_prior``) is uniform: KL(mean prediction ‖ prior) is then ln K less the mean
    prediction's entropy (me-max, eq. 1).
    """

    config: MSNConfig
    compared = None
    followed = ("backbone", "projector")
    start_left = 0.9  # as DINO's teacher
    masked_views = ("pixel_values",)
    compares_images = "the mean prediction over the images of the batch is held against a prior"
    paper = Paper(
        name="MSN",
        title="Masked Siamese Networks for Label-Efficient Learning",
        arxiv="2204.07141",
        bibtex="assran2022msn",
        authors=(
            "Assran, Mahmoud and Caron, Mathilde and Misra, Ishan and Bojanowski, Piotr and Bordes, Florian"
            " and Vincent, Pascal and Joulin, Armand and Rabbat, Michael and Ballas, Nicolas"
        ),
        teaches="a view without some patches joins the cluster of the whole view",
    )
    processor_class = MSNImageProcessor
    default_backbone = "vit-small"
    lr_scaling = ("none", 1024)
    # The official cosines aim at lr 1e-6 and decay .4 after 1.25 times the run: these are their values where it ends.
    # Its clip at 3 leaves the prototypes out; here they belong to the norm.
    default_arguments = {
        "optim": "adamw_torch_fused", "base_learning_rate": 1e-3, "min_learning_rate": 1e-4, "weight_decay": 0.04,
        "weight_decay_end": 0.37, "warmup_steps": 0.02, "max_grad_norm": 3.0, "per_device_train_batch_size": 64,
        "num_train_epochs": 800,
    }  # fmt: skip

    def add_parts(self, config: MSNConfig) -> None:
        backbones.make_maskable(self.backbone)
        self.projector = self.make_projector(3, activation=nn.GELU)
        self.prototypes = nn.Parameter(torch.empty(config.out_dim, config.projection_dim))
        self.add_teacher()

    @property
    def average(self) -> PreTrainedModel:
        return self.teacher_backbone  # what the official code evaluates

    def teacher_momentum(self, progress: float) -> float:
        return schedules.linear(progress, self.config.teacher_momentum, 1.0, until=1.25)

    def log_prior(self) -> Tensor:
        """(K,) logarithms of how often each prototype should be predicted."""
        return self.prototypes.new_full((self.config.out_dim,), -math.log(self.config.out_dim))

    def losses(self, pixel_values: Tensor, local_pixel_values: Tensor | None = None) -> SSLOutput:
        """pixel_values: (B, 1 + V, C, H, W), the teacher's view first; local_pixel_values:
        (B, V, C, h, w) small anchors, which lose no patches."""
        self.check_views(pixel_values)
        targets = self.teach(pixel_values[:, :1])
        encoded = [self.encode_masked(pixel_values[:, 1:])]
        if local_pixel_values is not None:
            encoded.append(self.encode(local_pixel_values))
        anchors = torch.cat([self.project(self.projector, rows, len(targets)) for rows in encoded])
        loss, metrics = self.match(anchors, targets)
        return SSLOutput(loss, encoded[0], metrics)

    def encode_masked(self, views: Tensor) -> Tensor:
        """(B, V, C, H, W) -> (V·B, D) class tokens without the patches that this step drops.

        The step alone decides which: ranks, micro-batches and resumed runs drop the same.
        """
        patch = backbones.patch_size(self.backbone.config)
        patches = (views.shape[-2] // patch) * (views.shape[-1] // patch)
        keep = int(patches * (1 - self.config.patch_drop))
        if keep == patches:
            return self.encode(views)
        places, _, _ = masks.random_masking(distributed.step_uniform(self.step, 1, patches), keep)

        def encoder(images: Tensor) -> Tensor:
            return backbones.visible_features(self.backbone, images, places.expand(len(images), -1))

        return backbones.over_views(encoder, views, self.config.joint_batchnorm)

    def match(self, anchors: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Anchors (V·B, d), view-major, against the teacher's (B, d): the loss (MSN, eq. 1) and what to log.

        The mean prediction is that of all ranks, with gradient.
        """
        c = self.config
        prototypes = F.normalize(self.prototypes.float(), dim=1)
        predicted = self._predict(anchors, prototypes)
        assigned = self.assign(targets, prototypes)
        agreement = predicted.unflatten(0, (-1, len(targets))).mean(0)
        cross_entropy = -(assigned * agreement).sum(1).mean()
        probabilities = predicted.exp()
        mean = distributed.sum_with_grad(probabilities.mean(0)) / distributed.world_size()
        divergence = -torch.special.entr(mean).sum() - (mean * self.log_prior()).sum()
        entropy = -(probabilities * predicted).sum(1).mean()
        loss = cross_entropy + c.prior_weight * divergence + c.entropy_weight * entropy
        terms = {"cross_entropy": cross_entropy, "prior_divergence": divergence, "anchor_entropy": entropy}
        return loss, {key: term.detach() for key, term in terms.items()} | target_entropies(assigned)

    def _predict(self, rows: Tensor, prototypes: Tensor) -> Tensor:
        """(N, d) and unit prototypes (K, d) -> logarithms (N, K) of the predicted probabilities."""
        smoothing = self.config.label_smoothing
        logarithms = similarities(F.normalize(rows.float(), dim=1), prototypes, self.config.temperature).log_softmax(1)
        if not smoothing:
            return logarithms
        return torch.lerp(logarithms.exp(), logarithms.new_tensor(1 / len(prototypes)), smoothing).log()

    @torch.no_grad()
    def assign(self, targets: Tensor, prototypes: Tensor) -> Tensor:
        """The teacher's (B, d) and unit prototypes (K, d) -> sharpened assignments (B, K)."""
        c = self.config
        sharpened = (self._predict(targets, prototypes) / c.sharpening).log_softmax(1)  # p^(1 / T), normalised
        if not c.sinkhorn_iterations:
            return sharpened.exp()
        return distributed.sinkhorn(sharpened, 1.0, c.sinkhorn_iterations)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            bound = self.prototypes.shape[1] ** -0.5
            init.uniform_(self.prototypes, -bound, bound)
