"""Features, patch tokens and attention of any native transformers vision model, timm models included.

Nothing here depends on how a model was trained: the evaluation uses it on foreign checkpoints as well.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .forward import run
from .kinds import Backbone, has_cls, is_image_text, is_timm, num_prefix_tokens, projection, unwrap
from .tokens import class_token_alone


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
    with class_token_alone(base):
        return _feature(backbone, run(base, pixel_values))


def features_and_outputs(backbone: Backbone, pixel_values: Tensor, **wanted: bool) -> tuple[Tensor, Any]:
    """``features`` (B, D) and the native output. wanted: output_hidden_states, output_attentions."""
    outputs = run(unwrap(backbone), pixel_values, **wanted)
    return _feature(backbone, outputs), outputs


def _feature(backbone: Backbone, outputs: Any) -> Tensor:
    if is_image_text(backbone):
        if hasattr(backbone, "image_projection"):  # FLAVA projects its class token
            return backbone.image_projection(outputs.last_hidden_state[:, 0])
        pooled, project = outputs.pooler_output, projection(backbone)
        return pooled.flatten(1) if project is None else project(pooled)
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
        outputs = run(classifier, pixel_values, **wanted)
    finally:
        seen, base.watched, base.seen = base.seen, False, None
    return outputs.logits, pool(base, seen), outputs


def patch_tokens(backbone: Backbone, pixel_values: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, D): patch tokens (or the last feature map's pixels) row by row, no class token."""
    backbone = unwrap(backbone)
    return _patches(backbone, run(backbone, pixel_values))


def features_and_patches(backbone: Backbone, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """``features`` (B, D) and ``patch_tokens`` (B, N, D) of one pass; not for image-text models."""
    backbone = unwrap(backbone)
    outputs = run(backbone, pixel_values)
    return pool(backbone, outputs), _patches(backbone, outputs)


def feature_maps(backbone: Backbone, pixel_values: Tensor, levels: list[int]) -> list[Tensor]:
    """(B, C, H, W) -> (B, D, rows, columns) of each of the native model's hidden states in ``levels``."""
    hidden = run(backbone, pixel_values, output_hidden_states=True).hidden_states
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
        channels_last = is_timm(backbone) and getattr(backbone.timm_model, "output_fmt", "NCHW") == "NHWC"
        return hidden.flatten(1, 2) if channels_last else hidden.flatten(2).transpose(1, 2)
    return hidden[:, num_prefix_tokens(backbone) :]


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
        attentions = run(backbone, pixel_values, output_attentions=True).attentions
    finally:
        backbone.set_attn_implementation(before)
    return attentions[-1][:, :, 0, num_prefix_tokens(backbone) :]
