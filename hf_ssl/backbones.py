"""Features, patch tokens and attention of any native transformers vision model, timm models included.

Nothing here depends on how a model was trained: the evaluation uses it on foreign checkpoints as well.
"""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from . import class_token
from .backbone_presets import PRESETS as PRESETS
from .backbone_presets import from_preset as from_preset
from .loading import from_config

_CLASS_TOKEN = r"embeddings(\.\d+)?\.(cls_token|class_embedding)$"  # by name, of a parameter
Backbone = Any  # a native PreTrainedModel; nn.Module types every attribute as Tensor | Module


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The native model of ``config`` with random weights, without the learned pooler that no method trains."""
    model_class = MODEL_MAPPING.get(type(config), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    kwargs: dict[str, Any] = {"dtype": torch.get_default_dtype()}  # not that of the checkpoint the config comes from
    height, width = image_size(config)
    if height != width:
        _check_own_size(config)
    if model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        # Swin's and ConvNeXt's "pooler" is a plain average that belongs to the feature: keep it.
        kwargs["add_pooling_layer"] = config.model_type == "swin"
    return from_config(AutoModel, config, **kwargs)


def _check_own_size(config: PreTrainedConfig) -> None:
    """ValueError where the native model does not take pictures of its own config's size, which is not square."""
    height, width = image_size(config)
    try:
        with torch.device("meta"), torch.no_grad():
            whole = from_config(AutoModel, copy.deepcopy(config), dtype=torch.float32).eval()
            whole(torch.zeros(1, getattr(config, "num_channels", 3), height, width))
    except (RuntimeError, TypeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(
            f"a native {config.model_type} with image_size [{height}, {width}] does not run on pictures of that size "
            f"({cause}): most take positions for those of a square. Take a square image_size (views may have another "
            "shape), or a ViT, whose image_size need not be a square"
        ) from error


def feature_dim(backbone: Backbone) -> int:
    """Width D of ``features``."""
    if is_image_text(backbone):
        joint = getattr(backbone.config, "projection_dim", None) if _projection(backbone) is not None else None
        return joint or feature_dim(unwrap(backbone))
    if hasattr(backbone, "timm_model"):
        return backbone.timm_model.num_features
    config = backbone.config
    width = getattr(config, "hidden_size", None) or getattr(backbone, "num_features", None)  # FocalNet's
    width = width or (getattr(config, "hidden_sizes", None) or [None])[-1]
    if width is None:
        raise ValueError(
            f"cannot tell the feature width of a {type(backbone).__name__}: its config has no hidden_size"
        )
    return width


def is_image_text(backbone: Backbone) -> bool:
    """Whether it is a native model with an image and a text tower: CLIP, SigLIP, a dual encoder and their like."""
    return hasattr(backbone, "get_image_features") and hasattr(backbone, "get_text_features")


def _projection(backbone: Backbone) -> Any:
    """From an image tower to the joint space; None where the tower ends there (SigLIP)."""
    found = (getattr(backbone, name, None) for name in ("visual_projection", "image_projection"))
    return next((projection for projection in found if projection is not None), None)


def unwrap(model: Backbone) -> Backbone:
    """The base model in a native image classifier, the image tower of two; others, timm's too, are their own."""
    if is_image_text(model):
        return model.vision_model if hasattr(model, "vision_model") else model.image_model  # FLAVA's name
    is_classifier = type(model).__name__.endswith("ForImageClassification") and not hasattr(model, "timm_model")
    return model.base_model if is_classifier else model  # DINOv3's own base_model is not the whole of it


def _tokens(backbone: Backbone, pixel_values: Tensor, **kwargs: Any) -> Any:
    """The native forward pass, positions interpolated to the input's size where the model can."""
    pixel_values = pixel_values.to(next(backbone.parameters()).dtype)  # a teacher's may differ from its student's
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pictures come as (B, C, H, W), not as {tuple(pixel_values.shape)}: sequences of patches do not"
        )
    size: Any = tuple(pixel_values.shape[-2:])
    check_size(getattr(backbone, "config", None), *size)
    timm_model: Any = getattr(backbone, "timm_model", None)
    if getattr(timm_model, "num_classes", 0):  # timm's classifier is its own base model: stop before its last layer
        hidden = timm_model.forward_features(pixel_values)
        return BaseModelOutputWithPooling(hidden, timm_model.forward_head(hidden, pre_logits=True))
    taken = inspect.signature(type(backbone).forward).parameters
    if "spatial_shapes" in taken:
        return backbone(**_as_sequences(pixel_values, patch_size(backbone.config)), **kwargs)
    if "interpolate_pos_encoding" in taken:
        kwargs["interpolate_pos_encoding"] = resized = size != image_size(backbone.config)
        if resized:
            _know_own_grid(backbone)
    if type(backbone).__name__ == "ViTMAEModel":
        return _unmasked(backbone, pixel_values, **kwargs)
    return backbone(pixel_values, **kwargs)


def _unmasked(backbone: Backbone, pixel_values: Tensor, **kwargs: Any) -> Any:
    """A native masked autoencoder on whole pictures, patches in order: it hides a random 75 % whenever it runs."""
    config = backbone.config
    count = math.prod(side // patch_size(config) for side in pixel_values.shape[-2:])
    order = torch.linspace(0, 1, count, device=pixel_values.device).expand(len(pixel_values), -1)
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        return backbone(pixel_values, noise=order, **kwargs)
    finally:
        config.mask_ratio = ratio


def _as_sequences(pixel_values: Tensor, patch: int) -> dict[str, Tensor]:
    """(B, C, H, W) as SigLIP 2 takes pictures of any shape: flat patches (B, N, p·p·C), their mask, their grids."""
    rows, columns = (side // patch for side in pixel_values.shape[-2:])
    whole = pixel_values[..., : rows * patch, : columns * patch]
    cells = whole.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
    patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    grids = torch.tensor([[rows, columns]], device=patches.device).expand(len(patches), -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=patches.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": grids}


def has_cls(backbone: Backbone) -> bool:
    return bool(_class_tokens(backbone))


def _class_tokens(backbone: Backbone) -> int:
    """How many class tokens stand before the patches: Pixio has eight. The one of a pooling head is none of them."""
    if hasattr(backbone, "timm_model"):
        return 0
    tokens = (p for name, p in backbone.named_parameters() if re.search(_CLASS_TOKEN, name))
    token = next(tokens, None)
    return 0 if token is None else token.shape[1] if token.ndim == 3 else 1


def pool(backbone: Backbone, outputs: Any) -> Tensor:
    """Native outputs -> (B, D): the class token after the final norm, else the model's own average, else the mean."""
    hidden = outputs.last_hidden_state
    if has_cls(backbone):
        return hidden[:, 0]
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)


def features(backbone: Backbone, pixel_values: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D): what kNN, probes and retrieval use, and what a plain ``AutoModel`` user reads off.

    Of an image-text model: the image in the joint space, projected and not normalised (``get_image_features``).
    """
    base = unwrap(backbone)
    with class_token.alone(base):
        return _feature(backbone, _tokens(base, pixel_values))


def features_and_outputs(backbone: Backbone, pixel_values: Tensor, **wanted: bool) -> tuple[Tensor, Any]:
    """``features`` (B, D) and the native output. wanted: output_hidden_states, output_attentions."""
    outputs = _tokens(unwrap(backbone), pixel_values, **wanted)
    return _feature(backbone, outputs), outputs


def _feature(backbone: Backbone, outputs: Any) -> Tensor:
    if is_image_text(backbone):
        if hasattr(backbone, "image_projection"):  # FLAVA projects its class token
            return backbone.image_projection(outputs.last_hidden_state[:, 0])
        pooled, projection = outputs.pooler_output, _projection(backbone)
        return pooled.flatten(1) if projection is None else projection(pooled)
    return pool(unwrap(backbone), outputs)


def over_views(encode: Callable[[Tensor], Tensor], views: Tensor, joint: bool = True) -> Tensor:
    """``encode`` over (B, V, C, H, W) -> (V·B, ...), view by view.

    joint: one pass, BatchNorm's statistics are those of all views together; else a pass, and statistics, per view.
    """
    if not joint:
        return torch.cat([encode(view) for view in views.unbind(1)])
    # Image by image is how views lie in memory: nothing is copied and channels-last survives; only results are turned.
    return encode(views.flatten(0, 1)).unflatten(0, views.shape[:2]).transpose(0, 1).flatten(0, 1)


def make_classifier(classifier: Backbone) -> None:
    """Prepare a native image classifier for ``classify``: a permanent hook, a no-op until asked."""
    base = unwrap(classifier)
    base.watched, base.seen = False, None
    base.register_forward_hook(_keep_output)


def _keep_output(module: Any, args: tuple, output: Any) -> None:
    if module.watched:
        module.seen = output


def classify(classifier: Backbone, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """One pass of a native image classifier: (B, C, H, W) -> logits (B, K) and ``features`` (B, D)."""
    return classify_with_outputs(classifier, pixel_values)[:2]


def classify_with_outputs(
    classifier: Backbone, pixel_values: Tensor, **wanted: bool
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """``classify``, and the native output with what is wanted of it (``features_and_outputs``; of timm's nothing)."""
    timm_model = getattr(classifier, "timm_model", None)
    if timm_model is not None:
        hidden = timm_model.forward_features(pixel_values.to(next(classifier.parameters()).dtype))
        return timm_model.forward_head(hidden), timm_model.forward_head(hidden, pre_logits=True), {}
    base = unwrap(classifier)
    if not hasattr(base, "watched"):
        make_classifier(classifier)
    base.watched = True
    try:
        outputs = _tokens(classifier, pixel_values, **wanted)
    finally:
        seen, base.watched, base.seen = base.seen, False, None
    return outputs.logits, pool(base, seen), outputs


def num_prefix_tokens(backbone: Backbone) -> int:
    """Tokens before the first patch: the class token, DeiT's distillation token and registers."""
    if hasattr(backbone, "timm_model"):
        return getattr(backbone.timm_model, "num_prefix_tokens", 0)
    distilled = any(name.endswith("distillation_token") for name, _ in backbone.named_parameters())
    return _class_tokens(backbone) + distilled + (getattr(backbone.config, "num_register_tokens", 0) or 0)


def patch_tokens(backbone: Backbone, pixel_values: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, D): patch tokens (or the last feature map's pixels) row by row, no class token."""
    backbone = unwrap(backbone)
    return _patches(backbone, _tokens(backbone, pixel_values))


def features_and_patches(backbone: Backbone, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """``features`` (B, D) and ``patch_tokens`` (B, N, D) of one pass; not for image-text models."""
    backbone = unwrap(backbone)
    outputs = _tokens(backbone, pixel_values)
    return pool(backbone, outputs), _patches(backbone, outputs)


def feature_maps(backbone: Backbone, pixel_values: Tensor, levels: list[int]) -> list[Tensor]:
    """(B, C, H, W) -> (B, D, rows, columns) of each of the native model's hidden states in ``levels``."""
    hidden = _tokens(backbone, pixel_values, output_hidden_states=True).hidden_states
    prefix = num_prefix_tokens(backbone)
    maps = [hidden[level] if hidden[level].ndim == 4 else hidden[level][:, prefix:] for level in levels]
    return [m if m.ndim == 4 else m.mT.unflatten(2, patch_grid(m.shape[1], *pixel_values.shape[2:])) for m in maps]


def patch_grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of N patches of a (height, width) picture: a grid of the picture's own shape."""
    rows = max(round((patches * height / width) ** 0.5), 1)
    while patches % rows:  # sides that are no multiple of the patch leave a grid of nearly that shape
        rows -= 1
    return rows, patches // rows


def _patches(backbone: Backbone, outputs: Any) -> Tensor:
    hidden = outputs.last_hidden_state
    if hidden.ndim == 4:
        channels_last = (
            hasattr(backbone, "timm_model") and getattr(backbone.timm_model, "output_fmt", "NCHW") == "NHWC"
        )
        return hidden.flatten(1, 2) if channels_last else hidden.flatten(2).transpose(1, 2)
    return hidden[:, num_prefix_tokens(backbone) :]


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
        hidden = _tokens(backbone, pixel_values, **given).last_hidden_state
    else:
        backbone.embeddings.patch_embeddings.hidden = (masked, mask_token)
        try:
            hidden = _tokens(backbone, pixel_values).last_hidden_state
        finally:
            backbone.embeddings.patch_embeddings.hidden = None
    return hidden[:, 0], hidden[:, num_prefix_tokens(backbone) :]


def layer_rates(backbone: Backbone, decay: float, patch_embedding: float) -> Iterator[tuple[nn.Parameter, float]]:
    """Each parameter of a transformer and its share of the learning rate: ``decay`` per block from the end, the tokens
    and embeddings before the first block, ``patch_embedding`` times that for the patch embedding (DINOv2)."""
    depth = backbone.config.num_hidden_layers
    for name, parameter in backbone.named_parameters():
        block = re.search(r"(?:^|\.)layers?\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else 0 if name.startswith("embeddings.") else depth + 1
        yield parameter, decay ** (depth + 1 - layer) * (patch_embedding if "patch_embeddings" in name else 1.0)


def patch_size(config: PreTrainedConfig) -> int:
    """Side of a square patch in pixels; ValueError where the backbone has none."""
    size = getattr(config, "patch_size", None)
    size = size[0] if isinstance(size, (list, tuple)) else size
    if size is None:
        raise ValueError(f"a {config.model_type} backbone has no patches: choose a ViT for this method")
    return size


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """(height, width) in pixels that the position table was built for."""
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_size(config: PreTrainedConfig | None, height: int, width: int, whole: bool = False) -> None:
    """ValueError where a picture is smaller than a patch; whole: where patches do not tile it, either."""
    sides = getattr(config, "patch_size", None)
    if sides is None:
        return
    down, across = (sides, sides) if isinstance(sides, int) else sides
    if height < down or width < across:
        raise ValueError(
            f"a view of {height}×{width} pixels is smaller than a patch of {down}×{across}: take larger views, or a "
            "backbone with smaller patches"
        )
    if whole and (height % down or width % across):
        raise ValueError(
            f"patches of {down}×{across} pixels do not tile a view of {height}×{width}, and whole patches are masked: "
            f"take a size of which both sides are multiples, such as {_near(height, down)}×{_near(width, across)}"
        )


def _near(side: int, patch: int) -> int:
    return max(round(side / patch), 1) * patch


def last_attention(backbone: Backbone, pixel_values: Tensor) -> Tensor:
    """Class-token → patch attention of the last block: (B, heads, N), each row summing to at most 1.

    Raises ValueError for models without a class token or without attention (convolutional networks, Swin, timm).
    """
    backbone = unwrap(backbone)
    if not has_cls(backbone):
        raise ValueError(f"{type(backbone).__name__} has no class token whose attention could be read")
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")  # sdpa and flash return no weights
    try:
        attentions = _tokens(backbone, pixel_values, output_attentions=True).attentions
    finally:
        backbone.set_attn_implementation(before)
    return attentions[-1][:, :, 0, num_prefix_tokens(backbone) :]


# --- visible tokens only ------------------------------------------------------------------------------------------


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


def patch_projection(backbone: Backbone) -> Any:
    """The convolution that embeds patches, None where there is none or patches overlap."""
    embeddings = getattr(backbone, "embeddings", None)
    projection: Any = getattr(getattr(embeddings, "patch_embeddings", None), "projection", None)
    alone = isinstance(projection, nn.Conv2d) and projection.stride == projection.kernel_size
    return projection if alone and projection.padding == (0, 0) and projection.groups == 1 else None


def visible_tokens(backbone: Backbone, pixel_values: Tensor, ids_keep: Tensor) -> Tensor:
    """Encode only the patches ``ids_keep`` (B, K): -> (B, prefix + K, D), in the order of ``ids_keep``."""
    check_size(backbone.config, *pixel_values.shape[-2:], whole=True)
    projection = patch_projection(backbone)
    holders = [backbone.embeddings] + ([] if projection is None else [projection])
    for holder in holders:
        holder.visible_patches = ids_keep
    try:
        return _tokens(backbone, pixel_values).last_hidden_state
    finally:
        for holder in holders:
            holder.visible_patches = None


def visible_features(backbone: Backbone, pixel_values: Tensor, ids_keep: Tensor) -> Tensor:
    """The class token (B, D) of ``visible_tokens``."""
    with class_token.alone(backbone):
        return visible_tokens(backbone, pixel_values, ids_keep)[:, 0]


# --- positions ----------------------------------------------------------------------------------------------------


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


def _know_own_grid(backbone: Backbone) -> None:
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
