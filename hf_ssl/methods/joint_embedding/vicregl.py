"""VICRegL: VICReg of whole views and of places that two views share (Bardes et al. 2022, 2210.01571).

Teaches features that segment as well as they classify: a place of one feature map agrees with its nearest place of the
other, nearest in the picture and nearest in feature.
Siblings: VICReg is its global half; DINOv2 and iBOT learn local features by masking; the other joint-embedding methods
here see whole views alone.

Where this differs from the official code, which by its own text means the same: its local loss is that of the last
pair divided by the number of pairs, here the mean over pairs; its places ignore mirroring by default and the second
direction of a pair always keeps 4 matches, here mirrored views are mirrored and the number depends on the view's kind;
its places are pixels, here shares of the picture's sides. Its map projector learns at a tenth of the rate, which LARS
undoes for weights in any case; here at the rate of all. Its online classifier is not part of the loss here.
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...backbones import feature_dim, features_and_patches, over_views, patch_grid
from ...heads import MLPHead
from ...losses import variance_and_covariance, vicreg_sum, vicreg_terms
from ...modeling import Paper, SSLOutput
from ...multi_view import MultiViewConfig, MultiViewModel
from ...processing import SSLImageProcessor, presets


@strict
class VICRegLConfig(MultiViewConfig):
    """alpha: share of the global loss (.75; .9 classifies better and segments worse). matches, local_matches: γ, the
    places kept when large and small views are matched by position. projection_dim, hidden_dim, num_layers: the
    expander of whole views; map_dim: all three widths of that of places. The weights are VICReg's. joint_batchnorm:
    the official code passes the views one by one."""

    model_type = "ssl_vicregl"

    alpha: float | int = 0.75
    matches: int = 20
    local_matches: int = 4
    projection_dim: int = 8192
    hidden_dim: int = 8192
    num_layers: int = 3
    map_dim: int = 512
    invariance_weight: float | int = 25.0
    variance_weight: float | int = 25.0
    covariance_weight: float | int = 1.0
    joint_batchnorm: bool = False
    limits = {"matches": "[1, inf)", "local_matches": "[1, inf)", "map_dim": "[1, inf)"}

    def __post_init__(self, **kwargs):
        if not 0 < self.alpha < 1:
            raise ValueError(
                f"alpha, the share of the global loss, lies between 0 and 1 (1 is VICReg), not {self.alpha}"
            )
        super().__post_init__(**kwargs)


class VICRegLImageProcessor(SSLImageProcessor):
    """BYOL's asymmetric pair with its boxes, as for the paper's ResNet-50. A further group of the key
    ``local_pixel_values`` gives small views: six of 96 px and area .08–.4 for its ConvNeXts."""

    _view_boxes = True
    views: ClassVar = presets.BYOL


class VICRegLForPreTraining(MultiViewModel):
    """Backbone → expander (whole views) and map expander (places) → α · global + (1 − α) · local loss."""

    config: VICRegLConfig
    compared = None
    paper = Paper(
        name="VICRegL",
        title="VICRegL: Self-Supervised Learning of Local Visual Features",
        arxiv="2210.01571",
        bibtex="bardes2022vicregl",
        authors="Bardes, Adrien and Ponce, Jean and LeCun, Yann",
        teaches="places that two views share agree, as the views do",
    )
    processor_class = VICRegLImageProcessor
    lr_scaling = ("linear", 256)
    compares_images = "variance and covariance are taken over the images of the batch"
    default_arguments: ClassVar = {
        "optim": "lars", "base_learning_rate": 0.3, "min_learning_rate": 3e-4, "weight_decay": 1e-6,
        "warmup_steps": 0.1, "per_device_train_batch_size": 256, "num_train_epochs": 100,
    }  # fmt: skip

    def add_parts(self, config: VICRegLConfig) -> None:
        dim = feature_dim(self.backbone)
        self.projector = self.make_projector(config.num_layers, hidden_bias=True, last_bias=False)
        self.map_projector = MLPHead([dim, *[config.map_dim] * 3], hidden_bias=True, last_bias=False)

    def losses(
        self,
        pixel_values: Tensor,
        pixel_values_boxes: Tensor | None = None,
        local_pixel_values: Tensor | None = None,
        local_pixel_values_boxes: Tensor | None = None,
    ) -> SSLOutput:
        """pixel_values: (B, V, C, H, W) large views, at least 2; local_pixel_values: small
        ones. *_boxes: (B, V, 5), where the views were cut from, as the image processor hands them out."""
        self.check_views(pixel_values)
        embeddings, views = self._encode_views(pixel_values, pixel_values_boxes, self.config.matches)
        if local_pixel_values is not None:
            views += self._encode_views(local_pixel_values, local_pixel_values_boxes, self.config.local_matches)[1]
        pairs = [(i, j) for i in range(2) for j in range(len(views)) if i != j]
        whole, local = self._whole_terms(views, pairs), self._local_terms(views, pairs)
        alpha, names = self.config.alpha, ("invariance", "variance", "covariance")
        loss = alpha * vicreg_sum(self.config, *whole) + (1 - alpha) * vicreg_sum(self.config, *local)
        metrics = dict(zip((*names, *(f"local_{name}" for name in names)), (*whole, *local), strict=True))
        return SSLOutput(loss, embeddings, {name: term.detach() for name, term in metrics.items()})

    def _encode_views(self, pixels: Tensor, boxes: Tensor | None, matches: int) -> tuple[Tensor, list["View"]]:
        """(B, V, C, H, W) views of one size: their embeddings (V·B, D), and each of them for the loss."""
        if boxes is None:
            raise ValueError(
                "VICRegL matches places of a picture: it needs the boxes of VICRegLImageProcessor's views"
            )
        batch = len(pixels)
        tokens = over_views(self._tokens, pixels, self.config.joint_batchnorm)  # (V·B, 1 + N, D)
        embeddings, maps = tokens[:, 0], tokens[:, 1:]
        count = maps.shape[1]
        rows = self.project(self.map_projector, maps.flatten(0, 1), batch * count).unflatten(0, (-1, count))
        whole = self.project(self.projector, embeddings, batch)
        grid = patch_grid(count, *pixels.shape[-2:])
        parts = zip(whole.split(batch), rows.split(batch), boxes.unbind(1), strict=True)
        return embeddings, [View(z.float(), m.float(), centres(box, grid), min(matches, count)) for z, m, box in parts]

    def _tokens(self, images: Tensor) -> Tensor:
        feature, patches = features_and_patches(self.backbone, images)
        return torch.cat([feature[:, None], patches], dim=1)

    def _whole_terms(self, views: list["View"], pairs: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Invariance over pairs of views, variance and covariance over views: means."""
        invariance = torch.stack([F.mse_loss(views[i].whole, views[j].whole) for i, j in pairs]).mean()
        regularisers = zip(*(variance_and_covariance(view.whole) for view in views), strict=True)
        return invariance, *(torch.stack(terms).mean() for terms in regularisers)

    def _local_terms(self, views: list["View"], pairs: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        """The three terms, mean over pairs, of places matched by feature plus places matched by position."""
        seen: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # by direction: a pair and its mirror image share both
        for i, j in dict.fromkeys([*pairs, *((j, i) for i, j in pairs)]):  # in one order on all ranks
            matched = [vicreg_terms(*pair) for pair in (by_feature(views[i], views[j]), by_place(views[i], views[j]))]
            invariance, variance, covariance = (sum(terms[1:], terms[0]) for terms in zip(*matched, strict=True))
            seen[i, j] = invariance, variance, covariance / 2  # a mean of both sides, where VICReg adds them
        both = [terms for i, j in pairs for terms in (seen[i, j], seen[j, i])]
        return tuple(torch.stack(terms).mean() for terms in zip(*both, strict=True))


class View(NamedTuple):
    """One view of each image: whole (B, d), maps (B, N, m) row by row, places (B, N, 2), and how many are matched by
    position, and by feature (None: all, the official default)."""

    whole: Tensor
    maps: Tensor
    places: Tensor
    matches: int
    feature_matches: int | None = None


def centres(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 5) boxes -> (B, rows · columns, 2): (x, y) of each cell's centre as shares of the picture, row by row."""
    rows, columns = grid
    left, top, width, height, mirrored = boxes.float().unbind(-1)
    x = (torch.arange(columns, device=boxes.device) + 0.5) / columns
    y = (torch.arange(rows, device=boxes.device) + 0.5) / rows
    x = left[:, None] + width[:, None] * torch.where(mirrored[:, None] > 0, 1 - x, x)
    y = top[:, None] + height[:, None] * y
    shape = (len(boxes), rows, columns)
    return torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=-1).flatten(1, 2)


def by_feature(first: View, second: View) -> tuple[Tensor, Tensor]:
    """Every place of the first (B, N, m), or those of feature_matches, and of the second that of nearest feature."""
    with torch.no_grad():
        distance, nearest = torch.cdist(first.maps, second.maps).min(-1)
    return _matched(first, second, distance, nearest, first.feature_matches)


def by_place(first: View, second: View) -> tuple[Tensor, Tensor]:
    """The γ places of the first that lie nearest to any of the second, in their order, and those they lie nearest."""
    distance, nearest = (first.places[:, :, None] - second.places[:, None]).square().sum(-1).min(-1)
    return _matched(first, second, distance, nearest, first.matches)


def _matched(first: View, second: View, distance: Tensor, nearest: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """The ``count`` places of the first of least distance (B, N), and what is ``nearest`` (B, N) to each."""
    if count is None:
        return first.maps, _pick(second.maps, nearest)
    kept = distance.topk(count, largest=False).indices.sort().values
    return _pick(first.maps, kept), _pick(second.maps, nearest.gather(1, kept))


def _pick(maps: Tensor, index: Tensor) -> Tensor:
    return maps.gather(1, index[..., None].expand(-1, -1, maps.shape[-1]))
