"""Official ViT state dicts (fused qkv, timm names) onto transformers' ViT, and gradients back."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig

_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def native_names(official: str) -> list[str]:
    """Where one official parameter lives in transformers' ViT: one name, or three for the fused qkv."""
    if official in _OUTSIDE:
        return [_OUTSIDE[official]]
    _, index, rest = official.split(".", 2)  # blocks.<index>.<rest>
    stem, leaf = rest.rsplit(".", 1)
    if stem == "attn.qkv":
        return [f"layers.{index}.attention.{part}_proj.{leaf}" for part in "qkv"]
    return [f"layers.{index}.{_BLOCK[stem]}.{leaf}"]


def load(module: nn.Module, official: dict[str, Tensor]) -> None:
    """Fill ``module`` from an official state dict; every parameter and buffer must be met, and nothing else."""
    state = {}
    for name, value in official.items():
        targets = native_names(name)
        state.update(zip(targets, value.chunk(len(targets)), strict=True))
    module.load_state_dict(state, strict=True)


def gradient(module: nn.Module, official: str) -> Tensor:
    """The gradient of one official parameter, the three parts of a qkv put together again."""
    parameters = dict(module.named_parameters())
    return torch.cat([parameters[name].grad for name in native_names(official)])


def config(official: dict[str, Any], ln_eps: float) -> dict[str, Any]:
    """ViTConfig fields of the official constructor's arguments (its defaults where they are not given)."""
    size = official.get("img_size", 224)
    width = official.get("embed_dim", 768)
    return {
        "model_type": "vit",
        "image_size": size[0] if isinstance(size, list) else size,
        "patch_size": official.get("patch_size", 16),
        "num_channels": official.get("in_chans", 3),
        "hidden_size": width,
        "num_hidden_layers": official.get("depth", 12),
        "num_attention_heads": official.get("num_heads", 12),
        "intermediate_size": int(width * official.get("mlp_ratio", 4)),
        "qkv_bias": official.get("qkv_bias", False),
        "layer_norm_eps": ln_eps,
    }


def native_config(official: dict[str, Any], ln_eps: float) -> ViTConfig:
    fields = config(official, ln_eps)
    fields.pop("model_type")
    return ViTConfig(**fields)
