"""OBoW: crops predict which visual words a teacher sees in the whole image (Gidaris et al. 2021, 2012.11552).

Teaches bag-of-words prediction online: the words are a queue of the teacher's own local features, and the classifier
over them is generated from them, since they change all the time.
Siblings: SwAV and DeepCluster v2 put a whole image in one cluster; DINO and BYOL compare global features alone, where
these targets say what is seen anywhere in the image; MoCo's queue holds whole images.

Where this differs from the official code: the mean distance that scales the assignments is that of the steps before,
as an average that starts at nothing; there it counts the batch at hand as well and starts at a half.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ... import backbones, distributed
from ...heads import MLPHead
from ...losses import target_entropies
from ...memory import Center, FeatureQueue
from ...modeling import Paper, SSLOutput
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class OBoWConfig(MultiViewConfig):
    """levels: the hidden states of the native model that words are taken from, counted from the last one, −1; None is
    the last two. vocabulary_size: words K of a level. inverse_delta: how sharply a local feature is assigned to
    its nearest words. distance_momentum: of the mean distance to the nearest word, which sets the scale. kappa: length
    of the generated weights. teacher_momentum: rises from here to 1 along half a cosine. joint_batchnorm: True
    as in the official code: crops of one size share statistics."""

    model_type = "ssl_obow"

    levels: list[int] | None = None
    vocabulary_size: int = 8192
    inverse_delta: float | int = 15.0
    distance_momentum: float | int = 0.99
    kappa: float | int = 8.0
    teacher_momentum: float | int = 0.99
    limits = {
        "vocabulary_size": "[1, inf)", "inverse_delta": "(0, inf)", "distance_momentum": "[0, 1]", "kappa": "(0, inf)",
    }  # fmt: skip

    def __post_init__(self, **kwargs):
        if self.levels is not None and max(self.levels, default=0) >= 0:
            raise ValueError(f"levels count hidden states from the last one, -1, -2, ...; got {self.levels}")
        super().__post_init__(**kwargs)


class OBoWImageProcessor(SSLImageProcessor):
    """The teacher's whole image, two medium crops and five small ones (section 4.1). The official small ones lie on a
    jittered grid over one crop of 60 to 100 %: these, drawn one by one, cover as much of the image each."""

    views: ClassVar = [
        {"key": "pixel_values", "count": 2, "size": 160, "scale": [0.08, 0.6], **presets.HALF_COLOUR, "blur_p": 0.5},
        {"key": "local_pixel_values", "count": 5, "size": 96, "scale": [0.085, 0.14], **presets.HALF_COLOUR},
        {"key": "teacher_pixel_values", "count": 1, "scale": None, "hflip": 0.5, "interpolation": "bilinear"},
    ]


class OBoWForPreTraining(MultiViewModel):
    """Student backbone · weights generated from the vocabulary ↔ bag of words of the teacher's feature maps."""

    config: OBoWConfig
    vocabulary: Any  # nn.ModuleList types what it holds as Tensor | Module
    generators: Any
    followed = ("backbone",)
    processor_class = OBoWImageProcessor
    paper = Paper(
        name="OBoW",
        title="OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised Learning",
        arxiv="2012.11552",
        bibtex="gidaris2021obow",
        authors=(
            "Gidaris, Spyros and Bursuc, Andrei and Puy, Gilles and Komodakis, Nikos and Cord, Matthieu"
            " and Pérez, Patrick"
        ),
        teaches="crops predict the visual words that a teacher finds anywhere in the image",
    )
    lr_scaling = ("linear", 256)
    default_arguments: ClassVar = {
        "optim": "sgd", "base_learning_rate": 0.03, "min_learning_rate": 3e-5, "weight_decay": 1e-4,
        "warmup_steps": 0.05, "per_device_train_batch_size": 64, "num_train_epochs": 200,
    }  # fmt: skip

    def add_parts(self, config: OBoWConfig) -> None:
        dim = backbones.feature_dim(self.backbone)
        stages = getattr(self.backbone.config, "hidden_sizes", None)
        self.levels = config.levels or [-2, -1]
        widths = [stages[level] if stages else dim for level in self.levels]
        self.vocabulary = nn.ModuleList(FeatureQueue(config.vocabulary_size, width) for width in widths)
        self.generators = nn.ModuleList(MLPHead([width, 2 * dim, dim]) for width in widths)
        self.nearest = Center(len(widths))  # mean squared distance of a local feature to its nearest word, per level
        self.add_teacher()

    def losses(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        teacher_pixel_values: Tensor | None = None,
    ) -> SSLOutput:
        """pixel_values: (B, 2, C, H, W) crops; local_pixel_values: (B, V, C, h, w);
        teacher_pixel_values: (B, 1, C, H', W'), the whole image."""
        self.check_views(pixel_values)
        if teacher_pixel_values is None:
            raise ValueError("OBoW's teacher looks at the whole image: give teacher_pixel_values (B, 1, C, H, W)")
        encoded = self.encode_crops(pixel_values, local_pixel_values)
        maps = backbones.feature_maps(self.teacher_backbone, teacher_pixel_values[:, 0], self.levels)
        with torch.autocast(pixel_values.device.type, enabled=False):  # distances and logits need float32
            bags = self.bags([_inner(level.detach().float()) for level in maps])
            loss = self.predict([rows.float() for rows in encoded], bags)
        entropies = target_entropies(bags[-1])
        return SSLOutput(loss, encoded[0], {
            "bag_entropy": entropies["teacher_entropy"], "vocabulary_entropy": entropies["prototype_entropy"],
        })  # fmt: skip

    def batch_statistics(self) -> Iterator[nn.Module]:
        apart = {id(module) for module in self.generators.modules()}  # these see the vocabulary, not images
        return (layer for layer in super().batch_statistics() if id(layer) not in apart)

    def predict(self, features: list[Tensor], bags: list[Tensor]) -> Tensor:
        """KL divergence of the predicted words, mean over rows and levels, summed over the kinds of crops (eq. 4)."""
        weights = self.classifiers()
        losses = [
            F.kl_div(F.log_softmax(rows @ words.T, dim=1), bag.repeat(len(rows) // len(bag), 1), reduction="batchmean")
            for rows in features
            for words, bag in zip(weights, bags, strict=True)
        ]
        return torch.stack(losses).sum() / len(bags)

    def classifiers(self) -> list[Tensor]:
        """(K, D) of every level: weights generated from the words."""
        with distributed.alone():  # the generators' BatchNorm sees the vocabulary, which is the same on all ranks
            return [
                self.config.kappa * F.normalize(_generate(generator, queue.rows), dim=1)
                for generator, queue in zip(self.generators, self.vocabulary, strict=True)
            ]

    @torch.no_grad()
    def bags(self, maps: list[Tensor]) -> list[Tensor]:
        """Feature maps (B, D, rows, columns) of every level -> bags of words (B, K) of sum 1: soft assignments to the
        vocabulary (eq. 2), the largest over all places. The vocabulary takes in theirs after the step."""
        distances = []
        for level, queue in zip(maps, self.vocabulary, strict=True):
            local, words = level.flatten(2).mT, queue.rows
            squares = local.square().sum(2, keepdim=True) + words.square().sum(1)
            distances.append((squares - 2 * local @ words.T).clamp(min=0))  # (B, N, K)
            if self.training:
                queue.push(self._one_place(level, queue.waiting.known()[0]))
        nearest = torch.stack([each.amin(2).mean(1) for each in distances], dim=1)  # (B, levels)
        if self.training:
            self.nearest.observe(nearest)
        decayed = 1 - self.config.distance_momentum ** self.step.float()  # what an average that starts at 0 has seen
        scale = torch.where(self.step > 0, self.nearest.value[0] / decayed, distributed.all_mean(nearest.mean(0)))
        codes = [(-self.config.inverse_delta / s * d).softmax(2) for s, d in zip(scale.clamp(min=1e-12), distances)]
        return [F.normalize(code.amax(1), p=1, dim=1) for code in codes]

    def _one_place(self, level: Tensor, before: int = 0) -> Tensor:
        """(B, D): for each image its 3×3 average at one place. The official code draws it; here places take turns over
        images and steps, so that ranks, micro-batches and a resumed run agree. before: images of the step so far."""
        means = F.avg_pool2d(level, [min(3, side) for side in level.shape[2:]], stride=1).flatten(2)
        place = (7919 * (distributed.own_rows(level) + before) + 104729 * self.step) % means.shape[2]
        return means.gather(2, place[:, None, None].expand(-1, means.shape[1], 1)).squeeze(2)

    @torch.no_grad()
    def update_state(self) -> None:
        self.nearest.advance(self.config.distance_momentum)
        for queue in self.vocabulary:
            queue.advance()


def _generate(generator: MLPHead, words: Tensor) -> Tensor:
    """Weights (K, D), float32, of the words (K, d), by a generator that may have been loaded in another precision."""
    return generator(F.normalize(words, dim=1).to(next(generator.parameters()).dtype)).float()


def _inner(level: Tensor) -> Tensor:
    """A feature map without its outermost cells, whose view is padded, where it has at least five by five."""
    return level[:, :, 1:-1, 1:-1] if min(level.shape[2:]) > 4 else level
