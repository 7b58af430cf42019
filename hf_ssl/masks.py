"""Masks over the patch grid, and images cut into patches and put together again."""

import math

import numpy as np
import torch
from torch import Tensor

_TRIES = 10  # boxes tried before a block is given up


def random_masking(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample uniform masking (MAE, section 3): the ``keep`` patches of lowest noise stay visible.

    noise: (B, N) uniform. Returns ids_keep (B, keep) in shuffled order, ids_restore (B, N), each patch's
    position in that order, and mask (B, N), 1 = removed. The class token is no patch and is never counted.
    """
    patches = noise.shape[1]
    if not 0 < keep < patches:
        raise ValueError(f"the mask must keep between 1 and {patches - 1} of {patches} patches, got {keep}")
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= keep).to(noise.dtype)
    return ids_shuffle[:, :keep], ids_restore, mask


def block_mask(
    rng: np.random.Generator, grid: tuple[int, int], patches: int, smallest: int = 4, largest: float = math.inf
) -> np.ndarray:
    """Block-wise masking (BEiT, algorithm 1): rectangles on a (rows, columns) grid until ``patches`` are masked.

    A block's area is uniform from ``smallest`` to what is missing (at most ``largest``), its aspect log-uniform from
    .3 to 1/.3; it never spans a side (as in the official code) and never masks too many. Bool (rows, columns); it can
    fall short of ``patches``, even to none, when ten tries find no block that fits.
    """
    mask, missing = np.zeros(grid, bool), patches
    while missing > 0:
        added = _add_block(rng, mask, smallest, min(missing, largest))
        if not added:
            break
        missing -= added
    return mask


def _add_block(rng: np.random.Generator, mask: np.ndarray, smallest: int, room: float) -> int:
    """Masks one more rectangle in place; how many patches it adds, 0 where none was found."""
    rows, columns = mask.shape
    for _ in range(_TRIES):
        area = smallest + (room - smallest) * rng.random()
        aspect = math.exp(math.log(0.3) * (1 - 2 * rng.random()))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        block = mask[top : top + height, left : left + width]
        added = block.size - int(block.sum())
        if 0 < added <= room:
            block[:] = True
            return added
    return 0


def ratio_bins(images: int, ratios: tuple[float, float]) -> Tensor:
    """(images + 1,) edges that share [low, high] out: one masked image draws its ratio from each bin (DINOv2)."""
    return torch.linspace(*ratios, images + 1)


def crop_masks(
    rng: np.random.Generator, crops: int, grid: tuple[int, int], share: float, ratios: tuple[float, float]
) -> np.ndarray:
    """Block-wise masks of one image's crops, bool (crops, N): crops · share of them have masked patches.

    A fraction of a crop is one more now and then, so that the share holds on average. Which crops is random, their
    ratios are stratified over ``ratios``. The class token is no patch and is never counted; a crop chosen has one
    masked patch at least. All of it depends on ``rng`` alone, and on no other image.
    """
    patches, masked = grid[0] * grid[1], int(crops * share + rng.random())
    result = np.zeros((crops, patches), bool)
    edges = ratio_bins(masked, ratios).numpy()
    for low, high, crop in zip(edges[:-1], edges[1:], rng.permutation(crops)):
        count = max(1, int(patches * rng.uniform(low, high)))
        result[crop] = block_mask(rng, grid, count, largest=patches * ratios[1]).ravel()
        if not result[crop].any():  # a grid of few patches, where no block fits
            result[crop, rng.integers(patches)] = True
    return result


def masked_positions(masks: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Of masks (images, N): the masked places among the images · N patches (M,), and for each 1 / its image's number.

    Computed on the host: masks that are drawn there cost no wait for the device.
    """
    chosen = (masks if isinstance(masks, np.ndarray) else masks.cpu().numpy()).astype(bool)
    places = np.flatnonzero(chosen)
    weights = 1.0 / chosen.sum(1)[places // chosen.shape[1]]
    return torch.from_numpy(places), torch.from_numpy(weights.astype(np.float32))


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, patch·patch·C); patches row by row, inside a patch (row, column, channel)."""
    batch, channels, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(f"image size {height}×{width} is no multiple of the patch size {patch}")
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of ``patchify``: (B, N, patch·patch·C) -> (B, C, height, width)."""
    batch, rows, columns = patches.shape[0], height // patch, width // patch
    x = patches.reshape(batch, rows, columns, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch to mean 0, variance 1 over all its values (MAE's norm_pix: unbiased, 1e-6 inside the root)."""
    mean = patches.mean(-1, keepdim=True)
    var = patches.var(-1, keepdim=True)
    return (patches - mean) / torch.sqrt(var + 1e-6)
