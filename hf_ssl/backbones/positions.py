"""Position codes: fixed tables, and learned ones resized to another grid."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kinds import Backbone, image_size, unwrap


def sincos_2d(dim: int, grid: int | tuple[int, int], prefix: int = 0, row_first: bool = False) -> Tensor:
    """Fixed 2-D sine-cosine position table (MAE's): (prefix + rows·columns, dim) float32, zeros for the prefix.

    The first half of the channels encodes the column, the second the row (row_first, MoCo v3's: the other way round);
    each half is [sin | cos].
    """
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width divisible by 4, got {dim}")
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = [axis.flatten()[:, None] * omega[None] for axis in ((y, x) if row_first else (x, y))]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
    return torch.cat([torch.zeros(prefix, dim), table])


def interpolate_positions(
    positions: Tensor,
    grid: tuple[int, int],
    prefix: int = 1,
    offset: float = 0.0,
    own: tuple[int, int] | None = None,
) -> Tensor:
    """Resize a learned position table (1, prefix + N, D) to ``grid`` (rows, columns), bicubic.

    own: the (rows, columns) that it has; None is a square.
    offset: DINO's released code passes the scale factor (n + 0.1)/√N to the sampler, which shifts the sampling grid;
    0 resizes to the exact size, as transformers does.
    """
    side = round((positions.shape[1] - prefix) ** 0.5)
    rows, columns = own or (side, side)
    if grid == (rows, columns):
        return positions
    table = positions[:, prefix:].reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    scale = [(n + offset) / before for n, before in zip(grid, (rows, columns))]
    to: dict[str, Any] = {"scale_factor": scale} if offset else {"size": grid}
    table = F.interpolate(table, **to, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :prefix], table.flatten(2).transpose(1, 2)], dim=1)


def set_position_offset(backbone: Backbone, offset: float) -> None:
    """Make a ViT resize its positions as DINO's released code does (see ``interpolate_positions``)."""
    backbone.embeddings.interpolate_pos_encoding = _Positions(backbone.embeddings, image_size(backbone.config), offset)


def know_own_grid(backbone: Backbone) -> None:
    """Let a native model whose table of positions is not square resize it as one of its own shape: transformers takes
    every table for a square one. At the native size nothing is resized, and plain transformers agrees."""
    height, width = image_size(backbone.config)
    embeddings = getattr(unwrap(backbone), "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if embeddings is None or height == width or not isinstance(table, Tensor):
        return
    if "interpolate_pos_encoding" in vars(embeddings):  # it knows already
        return
    embeddings.interpolate_pos_encoding = _Positions(embeddings, (height, width))


class _Positions:
    """Resizes the table of ``embeddings``, made for pictures of ``size`` (height, width). An object, neither a closure
    nor a method from outside: a copy or a pickle of the embeddings resizes its own table."""

    def __init__(self, embeddings: Any, size: tuple[int, int], offset: float = 0.0):
        self.embeddings, self.size, self.offset = embeddings, size, offset

    def __call__(self, tokens: Tensor, height: int, width: int) -> Tensor:
        table, patch = self.embeddings.position_embeddings, self.embeddings.patch_embeddings.patch_size
        own, grid = ((high // patch[0], wide // patch[1]) for high, wide in (self.size, (height, width)))
        return interpolate_positions(table, grid, table.shape[1] - own[0] * own[1], self.offset, own)
