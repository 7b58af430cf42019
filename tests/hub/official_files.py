"""Networks of torchvision and timm, and checkpoints of them in the names and wrappers of official code."""

import argparse
import itertools
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn


def resnet(block: str = "Bottleneck", classes: int | None = None) -> nn.Module:
    """A small torchvision ResNet whose every BatchNorm has statistics of its own."""
    kind = getattr(torchvision.models.resnet, block)
    model = torchvision.models.ResNet(kind, [1, 2, 1, 1], num_classes=classes or 7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    if classes is None:
        model.fc = nn.Identity()
    return model.eval()


def vit(**options: Any) -> nn.Module:
    """A small timm ViT with no parameter at its start value."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.models.vision_transformer.VisionTransformer(**(sizes | options)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        layers += [nn.Linear(inner, outer, bias=bias), nn.BatchNorm1d(outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def training_state() -> dict[str, Any]:
    return {"epoch": 100, "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 0.1}]}}


def dino_head(width: int) -> dict[str, Tensor]:
    layers = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))
    last = {"last_layer.weight_g": torch.rand(12, 1) + 0.5, "last_layer.weight_v": torch.randn(12, 8)}
    return prefixed("mlp.", state(layers)) | last


def dino_file(student: nn.Module, teacher: nn.Module, **args: Any) -> dict[str, Any]:
    heads = [dino_head(128), dino_head(128)]
    return {
        "student": prefixed("module.backbone.", state(student)) | prefixed("module.head.", heads[0]),
        "teacher": prefixed("backbone.", state(teacher)) | prefixed("head.", heads[1]),
        "dino_loss": {"center": torch.rand(1, 12)},
        "args": argparse.Namespace(arch="vit_small", output_dir="/home/somebody/runs", **args),
        "fp16_scaler": {"scale": 1.0},
        **training_state(),
    }  # fmt: skip
