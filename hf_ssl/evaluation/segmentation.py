"""Does attention find the object? DINO's protocol: class-token attention at 60 % of its mass against the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.data.sources import ImageSource, load_source
from hf_ssl.evaluation.features import Collect, Prepare, batches_of, frozen, load_backbone


class NoAttentionError(ValueError):
    """The model has no attention from a class token to its patches; the message names the model."""


class NoMaskError(ValueError):
    """No picture of the source has a usable foreground mask."""


def attention_at_mass(attention: Tensor, mass: float = 0.6) -> Tensor:
    """The smallest set of patches that holds `mass` of each map's attention: (..., N) weights -> (..., N) bool.

    Each map is normalised to sum 1 over its patches. Equal weights are taken in patch order.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}.")
    attention = attention.double()
    attention = attention / attention.sum(dim=-1, keepdim=True)
    ordered, order = attention.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # mass already collected when this patch's turn comes
    return torch.zeros_like(attention, dtype=torch.bool).scatter(-1, order, before < mass - 1e-9)


def attention_jaccard(attention: Tensor, masks: Tensor, mass: float = 0.6) -> Tensor:
    """Intersection over union of each head's `attention_at_mass` with the foreground: (B, heads) in [0, 1], float64.

    attention (B, heads, N): class token -> patches, row-major over a grid with the masks' aspect ratio.
    masks (B, H, W) bool, each with some foreground. Patches are upsampled to (H, W) by nearest neighbour.
    """
    batch, heads, patches = attention.shape
    height, width = masks.shape[-2:]
    rows = round((patches * height / width) ** 0.5)
    if rows == 0 or patches % rows:
        raise ValueError(f"{patches} patches do not form a grid over a {height} x {width} picture.")
    chosen = attention_at_mass(attention, mass).reshape(batch, heads, rows, patches // rows)
    chosen = F.interpolate(chosen.float(), size=(height, width), mode="nearest").bool()
    truth = masks.bool()[:, None].to(chosen.device)
    intersection, union = (chosen & truth).sum(dim=(2, 3)), (chosen | truth).sum(dim=(2, 3))
    return intersection.double() / union


def attention_segmentation(
    model,
    source: Any,
    processor=None,
    picture_and_mask: Callable[[dict, int], tuple[np.ndarray, np.ndarray]] | None = None,
    mass: float = 0.6,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool = True,
    max_images: int | None = None,
) -> dict[str, float]:
    """Jaccard of the last block's class-token attention with the foreground, over every picture of `source`.

    `picture_and_mask(row, index)` gives (H, W, C) uint8 and (H, W) bool; None = drawings with alpha (`alpha_mask`).
    The mask goes through the image processor's own resize and crop. Pictures whose mask is empty or full after that
    are left out. Returns {"jaccard_best": mean over pictures of the best head, "jaccard_mean": mean over pictures and
    heads, "images": count}. Raises NoAttentionError or NoMaskError, in a sentence.
    """
    source = load_source(source)
    from hf_ssl.backbones import last_attention

    model, processor = load_backbone(model, processor, device)
    parameter = next(model.parameters())
    home, dtype = parameter.device, parameter.dtype
    collect = _CollectMasks(source, Prepare(processor), picture_and_mask or alpha_mask(source))
    scores = []
    try:
        model.to(device or home)
        with frozen(model):
            batches: Any = batches_of(collect, batch_size, 0, progress, max_images, "attention")
            for pixels, masks in batches:
                try:
                    attention = last_attention(model, pixels.to(device or home, dtype))
                except ValueError as error:
                    raise NoAttentionError(f"Attention segmentation is not possible here: {error}") from error
                scores.append(attention_jaccard(attention.float().cpu(), masks, mass))
    finally:
        model.to(home)
    if not scores:
        raise NoMaskError(
            f"No picture of {source.name} ({source.split}) has a foreground mask. Attention segmentation needs "
            "drawings with transparency (emoji), or `picture_and_mask`."
        )
    jaccard = torch.cat(scores)
    return {
        "jaccard_best": jaccard.max(dim=1).values.mean().item(),
        "jaccard_mean": jaccard.mean().item(),
        "images": len(jaccard),
    }


def alpha_mask(source: ImageSource) -> Callable[[dict, int], tuple[np.ndarray, np.ndarray]]:
    """picture_and_mask for pictures with transparency, wherever `source` places them.

    The drawing is evaluated three times, as it is, all black and all white: where the last two differ it covers the
    background. This needs no knowledge of how the source composes it.
    """
    from hf_ssl.data.decode import decode_image

    def picture_and_mask(row: dict, index: int) -> tuple[np.ndarray, np.ndarray]:
        picture = source.image(row, index)
        drawing = decode_image(row["image"], keep_alpha=True, where=source.where(row))
        black, white = drawing.copy(), drawing.copy()
        black[..., :3], white[..., :3] = 0, 255
        low, high = (source.image({**row, "image": x}, index).astype(np.int16) for x in (black, white))
        return picture, (high - low).mean(axis=-1) > 127

    return picture_and_mask


class _CollectMasks(Collect):
    def __init__(self, source: ImageSource, prepare: Prepare, picture_and_mask):
        super().__init__(source, prepare, ())
        self.picture_and_mask = picture_and_mask

    def __call__(self, items: list[tuple[int, dict]]):
        from hf_ssl.data.decode import BadImageError

        pictures, masks, kept, skipped = [], [], [], []
        for index, row in items:
            try:
                picture, mask = self.picture_and_mask({**row, "_index": index}, index)
            except BadImageError as error:
                skipped.append(str(error))
                continue
            pictures.append(picture)
            masks.append(np.repeat(mask[..., None].astype(np.uint8) * 255, picture.shape[-1], axis=-1))
            kept.append((index, [row.get(name) for name in self.columns]))
        if not pictures:
            return None, kept, skipped
        truth = self.prepare(masks, do_rescale=False, do_normalize=False).float().mean(dim=1) > 127
        area = truth.float().mean(dim=(1, 2))
        usable = (area > 0) & (area < 1)  # a full mask says nothing about where the object is
        batch = (self.prepare(pictures)[usable], truth[usable]) if usable.any() else None
        return batch, kept, skipped
