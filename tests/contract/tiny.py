"""The smallest setting of every method: a new method adds one row to TINY, and the whole contract suite runs on it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ssl.methods import load
from hf_ssl.modeling import SSLModel
from hf_ssl.processing import SSLImageProcessor

VIT = {
    "model_type": "vit", "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32, "layer_norm_eps": 1e-6,
}  # fmt: skip
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic",
    "downsample_in_first_stage": False,
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    config: dict[str, Any]
    processor: dict[str, Any] = field(default_factory=lambda: {"size": 16})
    no_gradient: tuple[str, ...] = ()  # student parameters that training never moves, by how their name ends
    accumulates: bool = True  # whether micro-batches give the gradient of their union: no in-batch negatives
    takes_resnet: bool = True
    fixed_noise: bool = False  # forward draws random numbers itself, and takes them as ``noise`` (B, patches)


TINY: dict[str, Tiny] = {
    "simclr": Tiny({"projection_dim": 8, "hidden_dim": 16, "temperature": 0.5}, accumulates=False),
    "dino": Tiny(
        {"out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8, "teacher_temperature": 0.07, "freeze_last_layer": 0.0},
        {"size": 16, "local_pixel_values": {"size": 8, "count": 2}},
        no_gradient=("head.last_layer.weight_g",),
    ),
    "mae": Tiny(
        {"decoder_hidden_size": 16, "decoder_num_layers": 1, "decoder_num_heads": 2, "decoder_intermediate_size": 32},
        no_gradient=("embeddings.position_embeddings",),
        takes_resnet=False,
        fixed_noise=True,
    ),
}


def build(name: str, backbone: dict[str, Any] = VIT, seed: int = 0, **fields: Any) -> SSLModel:
    """A tiny model of a method, in training mode."""
    torch.manual_seed(seed)
    model = load(name)
    return model(model.config_class(backbone_config=dict(backbone), **{**TINY[name].config, **fields})).train()


def processor(name: str, **fields: Any) -> SSLImageProcessor:
    return load(name).processor_class(**{**TINY[name].processor, **fields})


def pictures(count: int, channels: int = 3, side: int = 20, seed: int = 0) -> list[np.ndarray]:
    """Smooth random pictures, uint8 (side, side, channels), no two alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = rng.uniform(1, 4, (count, channels, 2)), rng.uniform(0, 6.3, (count, channels))
    return [
        np.stack([127 + 120 * np.sin(6.3 * (a * x + b * y) + p) for (a, b), p in zip(w, ps)], -1).astype(np.uint8)
        for w, ps in zip(*waves)
    ]


def batch(name: str, count: int = 4, seed: int = 0, **fields: Any) -> dict[str, Tensor]:
    """One training batch as the collator would make it; where forward draws noise, the noise as well."""
    made = processor(name, **fields)
    views = dict(made(pictures(count, made.num_channels, seed=seed), seed=seed))
    if TINY[name].fixed_noise:
        patches = (made.size["height"] // VIT["patch_size"]) * (made.size["width"] // VIT["patch_size"])
        views["noise"] = torch.rand(count, patches, generator=torch.Generator().manual_seed(seed))
    return views


def students(model: SSLModel) -> dict[str, torch.nn.Parameter]:
    """Every parameter but the teachers'."""
    teachers = {id(parameter) for _, teacher in model.teachers() for parameter in teacher.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in teachers}


def train_step(model: SSLModel, optimizer: torch.optim.Optimizer, views: dict[str, Tensor]) -> Tensor:
    """One optimiser step with everything that the trainer does around it."""
    optimizer.zero_grad()
    loss = model(**views).loss
    loss.backward()
    model.before_optimizer_step(float(model.progress))
    optimizer.step()
    model.after_optimizer_step()
    return loss.detach()


def adamw(model: SSLModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
