"""The smallest setting of every method: a new method adds one row to TINY, and the whole contract suite runs on it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextConfig

from hf_ssl.backbones import two_towers
from hf_ssl.methods import load
from hf_ssl.modeling import SSLConfig, SSLModel
from hf_ssl.processing import SSLImageProcessor, tokenizers
from hf_ssl.processing.image_text import ImageTextProcessor

VIT = {
    "model_type": "vit", "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32, "layer_norm_eps": 1e-6,
}  # fmt: skip
DINOV2 = {
    "model_type": "dinov2_with_registers", "image_size": 16, "patch_size": 4, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "num_register_tokens": 3,
}  # fmt: skip
DINOV3 = {
    "model_type": "dinov3_vit", "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32, "num_register_tokens": 3,
    "pos_embed_rescale": None,  # positions are not redrawn: ranks and repeated passes then agree
}  # fmt: skip
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic",
    "downsample_in_first_stage": False,
}  # fmt: skip


CAPTIONS = [f"{size} {colour} {thing}" for size in ("big", "small") for colour in ("red", "blue", "green", "grey")
            for thing in ("waves", "ripples", "stripes", "checks")]  # fmt: skip
TOKENIZER = tokenizers.train_tokenizer(CAPTIONS, vocab_size=560, context_length=16)


def towers(vision: dict[str, Any]) -> dict[str, Any]:
    """CLIP's tiny text tower beside an image tower: CLIP's own for a square ViT's fields, else the dual encoder."""
    words = CLIPTextConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=TOKENIZER.eos_token_id, bos_token_id=TOKENIZER.bos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )  # fmt: skip
    return two_towers.image_text_config(vision, words, TOKENIZER, projection_dim=16).to_dict()


@dataclass(frozen=True)
class Tiny:
    config: dict[str, Any]
    processor: dict[str, Any] = field(default_factory=lambda: {"size": 16})
    no_gradient: tuple[str, ...] = ()  # student parameters that training never moves, by how their name ends
    accumulates: bool = True  # whether micro-batches give the gradient of their union: no in-batch negatives
    takes_resnet: bool = True
    classes: int = 0  # > 0: batches of labelled and unlabelled images, a backbone with a classifier
    native: Callable[[dict[str, Any]], dict[str, Any]] = dict  # an image backbone's fields -> backbone_config


MASKED_SIAMESE = Tiny(
    {"out_dim": 12, "hidden_dim": 16, "projection_dim": 8, "patch_drop": 0.25, "temperature": 0.5},
    {"size": 16, "local_pixel_values": {"size": 8, "count": 2}},
    accumulates=False,
    takes_resnet=False,
)
CROPS = {"size": 16, "local_pixel_values": {"size": 8, "count": 2}}
CLUSTERS = {"projection_dim": 8, "hidden_dim": 16, "num_prototypes": 6, "temperature": 0.2}
LABELS = {**CLUSTERS, "heads": 3, "num_examples": 8}  # a label per image, new ones after every eight
INSTANCES = {  # a step of 8 images, twice over; Z given: what the first of two micro-batches says is not what both say
    "num_examples": 24, "projection_dim": 8, "temperature": 0.5, "nce_negatives": 12, "partition": 30.0,
}  # fmt: skip
PATCH_DISTILLATION = Tiny(
    {"out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8, "freeze_last_layer": 0.0},
    {"size": 16, "local_pixel_values": {"size": 8, "count": 2}},
    accumulates=False,
    takes_resnet=False,
)
TINY: dict[str, Tiny] = {
    "instdisc": Tiny(INSTANCES),
    "pirl": Tiny({**INSTANCES, "num_patches": 4}, {"size": 16, "patch_pixel_values": {"size": None, "grid": 2}}),
    "dcl": Tiny({"projection_dim": 8, "hidden_dim": 16, "temperature": 0.5}, accumulates=False),
    "nnclr": Tiny(
        {"projection_dim": 8, "hidden_dim": 16, "predictor_hidden_dim": 16, "queue_size": 24, "temperature": 1.0},
        accumulates=False,
    ),
    "clip": Tiny({}, {"size": 16, "tokenizer": TOKENIZER}, accumulates=False, takes_resnet=False, native=towers),
    "barlow_twins": Tiny({"projection_dim": 8, "hidden_dim": 16}, accumulates=False),
    "lejepa": Tiny(
        {"projection_dim": 8, "hidden_dim": 16, "directions": 16},
        {"size": 16, "local_pixel_values": {"size": 8, "count": 2}},
        accumulates=False,
    ),
    "vicreg": Tiny({"projection_dim": 8, "hidden_dim": 16}, accumulates=False),
    "vicregl": Tiny({"projection_dim": 8, "hidden_dim": 16, "map_dim": 8, "matches": 3}, accumulates=False),
    "w_mse": Tiny(
        {"projection_dim": 3, "hidden_dim": 16, "sub_batch": 4, "iterations": 2, "epsilon": 0.1}, accumulates=False
    ),
    "simclr": Tiny({"projection_dim": 8, "hidden_dim": 16, "temperature": 0.5}, accumulates=False),
    "dino": Tiny(
        {"out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8, "teacher_temperature": 0.07, "freeze_last_layer": 0.0},
        {"size": 16, "local_pixel_values": {"size": 8, "count": 2}},
        no_gradient=("head.last_layer.weight_g",),
    ),
    "dinov2": PATCH_DISTILLATION,
    "dinov3": replace(
        PATCH_DISTILLATION,
        config={
            **PATCH_DISTILLATION.config,
            "patch_out_dim": 10,
            "patch_hidden_dim": 16,
            "patch_bottleneck_dim": 8,
        },
    ),
    "swav": Tiny({**CLUSTERS, "queue_size": 8, "queue_start": 0.0}, CROPS, accumulates=False),
    "deepcluster_v2": Tiny({**LABELS, "kmeans_iterations": 3}, CROPS, accumulates=False),
    "sela_v2": Tiny({**LABELS, "sinkhorn_iterations": 5}, CROPS, accumulates=False),
    "fixmatch": Tiny({"threshold": 0.26}, classes=4),  # low enough for an untrained model's guesses
    "obow": Tiny({"vocabulary_size": 12}, {**CROPS, "pixel_values": {"size": None}}, accumulates=False),
    "infomin": Tiny(
        {"projection_dim": 8, "queue_size": 24, "num_patches": 4, "teacher_momentum": 0.9},
        {"size": 16, "patch_pixel_values": {"size": None, "grid": 2}},
    ),
    "moco": Tiny({"projection_dim": 8, "queue_size": 24, "temperature": 0.2, "teacher_momentum": 0.9}),
    "mocov3": Tiny(
        {"projection_dim": 8, "hidden_dim": 16},
        no_gradient=("embeddings.position_embeddings", "projection.weight", "projection.bias"),
        accumulates=False,
    ),
    "msn": MASKED_SIAMESE,
    "pmsn": MASKED_SIAMESE,
    "simclr_v2": Tiny(
        {"projection_dim": 8, "hidden_dim": 16, "temperature": 1.0, "memory_size": 20, "teacher_momentum": 0.9},
        accumulates=False,
    ),
    "byol": Tiny({"projection_dim": 8, "hidden_dim": 16, "teacher_momentum": 0.9}),
    "ressl": Tiny({"projection_dim": 8, "hidden_dim": 16, "queue_size": 24, "teacher_momentum": 0.9}),
    "simsiam": Tiny({"projection_dim": 16, "bottleneck_dim": 8}),
    "tico": Tiny({"projection_dim": 8, "hidden_dim": 16, "teacher_momentum": 0.9}, accumulates=False),
    "mae": Tiny(
        {"decoder_hidden_size": 16, "decoder_num_layers": 1, "decoder_num_heads": 2, "decoder_intermediate_size": 32},
        no_gradient=("embeddings.position_embeddings",),
        takes_resnet=False,
    ),
}


def build(name: str, backbone: dict[str, Any] = VIT, seed: int = 0, **fields: Any) -> SSLModel:
    """A tiny model of a method, in training mode."""
    torch.manual_seed(seed)
    model = load(name)
    return model(make_config(name, backbone, **fields)).train()


def make_config(name: str, backbone: dict[str, Any] = VIT, **fields: Any) -> SSLConfig:
    """A tiny config of a method; a classifier's backbone names its classes."""
    backbone = dict(backbone)
    if TINY[name].classes:
        backbone = {"id2label": dict(enumerate("abcdefgh"[: TINY[name].classes])), **backbone}
    config_class: Any = load(name).config_class
    return config_class(backbone_config=TINY[name].native(backbone), **{**TINY[name].config, **fields})


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
    """One training batch as the collator would make it, masks and all."""
    made = processor(name, **fields)
    if TINY[name].classes:
        return labeled_batch(made, count, TINY[name].classes, seed)
    views = dict(made(pictures(count, made.num_channels, seed=seed), seed=seed))
    if draw := row_inputs(name):
        crops = {key: np.moveaxis(value.numpy(), 2, -1) for key, value in views.items() if value.ndim == 5}
        drawn = [draw(np.random.default_rng((seed, i)), {k: v[i] for k, v in crops.items()}) for i in range(count)]
        views |= {key: torch.from_numpy(np.stack([row[key] for row in drawn])) for key in drawn[0]}
    if load(name).needs_index:
        views["index"] = torch.arange(count)
    if isinstance(made, ImageTextProcessor):
        rows = np.random.default_rng(seed).permutation(len(CAPTIONS))[:count]
        views |= made.encode_text([CAPTIONS[row] for row in rows])
    return views


@cache
def row_inputs(name: str) -> Any:
    """What a tiny model of the method draws for each image beside its views."""
    with torch.random.fork_rng():
        return build(name).row_inputs()


def labeled_batch(made: SSLImageProcessor, count: int, classes: int, seed: int) -> dict[str, Tensor]:
    """``count`` labelled and twice as many unlabelled images, every fourth of them of unknown class."""
    bank = pictures(3 * count, made.num_channels, seed=seed)
    labeled, unlabeled = (dict(made(part, seed=seed + i)) for i, part in enumerate((bank[:count], bank[count:])))
    truth = torch.arange(2 * count) % classes
    return {
        "pixel_values": labeled.pop("pixel_values"),
        "labels": torch.arange(count) % classes,
        **{key: value for key, value in unlabeled.items() if key != "pixel_values"},
        "unlabeled_labels": truth.where(torch.arange(2 * count) % 4 > 0, -1),
        "unlabeled_index": torch.arange(2 * count),
    }


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
