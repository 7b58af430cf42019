"""Masks over the patch grid, and images cut into patches and put together again."""

import torch
from torch import Tensor


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
