"""Some tokens of a ViT alone: patches hidden by mask tokens, visible patches only, the class token only.

A ViT that is asked for its class token alone computes that one token in its last block, from all of them. The feature
is the same. Of the last block's products five in six are for tokens that nobody reads: 7 % of a step of DINO with 12
blocks, 20 % with four, in time and in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTLayer as NativeViTLayer
from transformers.models.vit.modeling_vit import eager_attention_forward

from .forward import run
from .kinds import Backbone, check_size, has_cls, num_prefix_tokens, patch_projection


def make_hidable(backbone: Backbone) -> bool:
    """Prepare ``backbone`` for ``class_and_patch_tokens``; whether it lacks a mask token, which is then given."""
    embeddings: Any = getattr(backbone, "embeddings", None)
    patches = getattr(embeddings, "patch_embeddings", None)
    if not has_cls(backbone) or not isinstance(patches, nn.Module):
        raise ValueError(
            f"{type(backbone).__name__} cannot have patches replaced by mask tokens: it needs a class token and patch "
            "embeddings (ViT, DINOv2, DINOv3)"
        )
    if getattr(embeddings, "mask_token", None) is not None:
        return False
    patches.hidden = None
    patches.register_forward_hook(_hide)
    return True


def _hide(module: Any, args: tuple, output: Tensor) -> Tensor:
    if module.hidden is None:
        return output
    masked, token = module.hidden
    return torch.where(masked.unsqueeze(-1), token.to(output.dtype), output)


def class_and_patch_tokens(
    backbone: Backbone, pixel_values: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) -> class tokens (B, D) and patch tokens (B, N, D), registers left out.

    masked: (B, N) bool, the patches given as mask tokens: the backbone's own, or ``mask_token`` (1, 1, D) where it has
    none (a ViT, which opens in plain transformers without one).
    """
    if masked is None or mask_token is None:
        given = {} if masked is None else {"bool_masked_pos": masked}
        hidden = run(backbone, pixel_values, **given).last_hidden_state
    else:
        backbone.embeddings.patch_embeddings.hidden = (masked, mask_token)
        try:
            hidden = run(backbone, pixel_values).last_hidden_state
        finally:
            backbone.embeddings.patch_embeddings.hidden = None
    return hidden[:, 0], hidden[:, num_prefix_tokens(backbone) :]


class VisiblePatches(nn.Conv2d):
    """A patch embedding that, asked for ``visible_patches`` (B, K), computes those alone and leaves zero elsewhere:
    exact, since patches do not overlap. A class, not a patched method: it is pickled and copied like any module."""

    visible_patches: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        keep = self.visible_patches
        if keep is None:
            return super().forward(input)
        batch, _, height, width = input.shape
        down, across = self.stride
        rows, columns = height // down, width // across
        grid = input.unflatten(2, (rows, down)).unflatten(4, (columns, across)).permute(0, 2, 4, 1, 3, 5)
        images = torch.arange(batch, device=keep.device)[:, None]
        visible = grid[images, keep // columns, keep % columns].flatten(2)  # (B, K, C·down·across)
        tokens = F.linear(visible, self.weight.flatten(1), self.bias)
        places = keep.unsqueeze(-1).expand_as(tokens)
        whole = tokens.new_zeros(batch, rows * columns, tokens.shape[-1]).scatter(1, places, tokens)
        return whole.transpose(1, 2).unflatten(2, (rows, columns))


def _keep_visible(module: Any, args: tuple, output: Any) -> Any:
    keep = module.visible_patches
    if keep is None:
        return output
    tokens, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
    prefix = module.prefix_tokens
    patches = tokens[:, prefix:]
    kept = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    tokens = torch.cat([tokens[:, :prefix], kept], dim=1)
    return tokens if rest is None else (tokens, *rest)


def make_maskable(backbone: Backbone) -> None:
    """Prepare ``backbone`` for ``visible_tokens``: a permanent hook on its embeddings, a no-op until asked."""
    embeddings: Any = getattr(backbone, "embeddings", None)
    if not has_cls(backbone) or getattr(embeddings, "position_embeddings", None) is None:
        raise ValueError(
            f"{type(backbone).__name__} cannot encode visible patches alone: it needs token embeddings with absolute "
            "positions (ViT, DeiT, DINOv2, BEiT, MSN); rotary positions and feature maps depend on the whole grid"
        )
    embeddings.visible_patches = None
    embeddings.prefix_tokens = num_prefix_tokens(backbone)
    embeddings.register_forward_hook(_keep_visible)
    projection = patch_projection(backbone)
    if projection is not None:
        projection.__class__ = VisiblePatches


def visible_tokens(backbone: Backbone, pixel_values: Tensor, ids_keep: Tensor) -> Tensor:
    """Encode only the patches ``ids_keep`` (B, K): -> (B, prefix + K, D), in the order of ``ids_keep``."""
    check_size(backbone.config, *pixel_values.shape[-2:], whole=True)
    projection = patch_projection(backbone)
    holders = [backbone.embeddings] + ([] if projection is None else [projection])
    for holder in holders:
        holder.visible_patches = ids_keep
    try:
        return run(backbone, pixel_values).last_hidden_state
    finally:
        for holder in holders:
            holder.visible_patches = None


def visible_features(backbone: Backbone, pixel_values: Tensor, ids_keep: Tensor) -> Tensor:
    """The class token (B, D) of ``visible_tokens``."""
    with class_token_alone(backbone):
        return visible_tokens(backbone, pixel_values, ids_keep)[:, 0]


# --- the class token alone ----------------------------------------------------------------------------------------


def prepare_class_token(model: nn.Module) -> None:
    """In place: the last block of every native ViT in ``model`` then knows ``class_token_alone``; names stay."""
    for module in model.modules():
        if type(module).__name__ == "ViTModel" and type(module).__module__.endswith(".modeling_vit"):
            module.layers[-1].__class__ = ViTLayer  # type: ignore[index, assignment]


@contextmanager
def class_token_alone(backbone: Any) -> Iterator[None]:
    """Meanwhile the last hidden state of a prepared ViT is (B, 1, D), its class token; others notice nothing."""
    layers = getattr(backbone, "layers", None)
    last: Any = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
    # A checkpointed block is computed a second time in the backward pass, when nobody asks any more.
    if not isinstance(last, ViTLayer) or (last.training and last.gradient_checkpointing):
        yield
        return
    last.class_alone = True
    try:
        yield
    finally:
        last.class_alone = False


class ViTLayer(NativeViTLayer):
    """The native block, or the first token of what it gives: (B, N, D) -> (B, 1, D). It keeps the native name, by
    which device maps and FSDP find blocks, and is a class, not a patched method, so that it can be pickled."""

    class_alone = False

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not self.class_alone or attention_mask is not None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        attended = _attend(self.attention, self.layernorm_before(hidden_states), **kwargs)
        token = hidden_states[:, :1] + self.dropout(attended)
        return token + self.dropout(self.mlp(self.layernorm_after(token)))


def _attend(attention: Any, tokens: Tensor, **kwargs: Any) -> Tensor:
    """What the first token draws from all: (B, N, D) -> (B, 1, D)."""
    implementation = attention.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    query, key, value = (
        project(part).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project, part in (
            (attention.q_proj, tokens[:, :1]), (attention.k_proj, tokens), (attention.v_proj, tokens),
        )
    )  # fmt: skip
    dropout = attention.attention_dropout if attention.training else 0.0
    drawn, _ = attend(attention, query, key, value, None, dropout=dropout, scaling=attention.scaling, **kwargs)
    return attention.o_proj(drawn.flatten(2))
