"""Heads on top of a backbone: MLP projector, DINO head, small transformer decoder."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTLayer


class MLPHead(nn.Sequential):
    """Linear → BatchNorm → ReLU, repeated; the last layer has no ReLU. (B, dims[0]) -> (B, dims[-1]).

    hidden_bias / last_bias: whether the linears carry a bias (a following BatchNorm's shift serves as well).
    last_norm: None, "affine", "scale" (no shift: SimCLR) or "plain" (neither: SimSiam, MoCo v3).
    activation: after each hidden layer.
    """

    def __init__(
        self,
        dims: Sequence[int],
        hidden_norm: bool = True,
        hidden_bias: bool = False,
        last_norm: str | None = None,
        last_bias: bool = True,
        activation: type[nn.Module] = nn.ReLU,
    ):
        layers: list[nn.Module] = []
        for inner, outer in pairwise(dims[:-1]):
            layers.append(nn.Linear(inner, outer, bias=hidden_bias))
            layers += [nn.BatchNorm1d(outer)] if hidden_norm else []
            layers.append(activation())
        layers.append(nn.Linear(dims[-2], dims[-1], bias=last_bias))
        if last_norm is not None:
            norm = nn.BatchNorm1d(dims[-1], affine=last_norm != "plain")
            if last_norm == "scale":
                norm.register_parameter("bias", None)
            layers.append(norm)
        super().__init__(*layers)


class PatchesHead(nn.Module):
    """Of a jigsaw's patches: a head for each, the same for all, the results side by side, and a linear layer.

    (P·B, in_dim), the first patch of all images first -> (B, out_dim). No BatchNorm. hidden_dim: None makes the head
    of each linear too.
    """

    def __init__(self, in_dim: int, hidden_dim: int | None, out_dim: int, patches: int):
        super().__init__()
        self.patches = patches
        middle = [] if hidden_dim is None else [hidden_dim]
        self.each = MLPHead([in_dim, *middle, out_dim], hidden_norm=False, hidden_bias=True)
        self.together = nn.Linear(patches * out_dim, out_dim)

    def check(self, views: Tensor | None, method: str) -> Tensor:
        """ValueError where ``views`` (B, P, C, h, w) are not as many as the head takes."""
        got = "none" if views is None else views.shape[1]
        if views is None or got != self.patches:
            raise ValueError(f"{method} needs {self.patches} patches of each image (patch_pixel_values), got {got}")
        return views

    def forward(self, x: Tensor) -> Tensor:
        return self.together(torch.cat(self.each(x).chunk(self.patches), dim=1))


class _RowNorms(torch.autograd.Function):
    """‖v‖ per row, (K, D) -> (K, 1); its backward passes over K·D numbers once where torch's own does three times."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        ctx.save_for_backward(v, norms)
        return norms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        v, norms = ctx.saved_tensors
        return v * (grad / norms)


class WeightNormLinear(nn.Module):
    """Bias-free linear layer with weight g · v/‖v‖ per row; ``weight_g`` (K, 1), ``weight_v`` (K, D)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K). Scales the products, not the weights: K·D numbers are read once and none are written."""
        gain = self.weight_g / _RowNorms.apply(self.weight_v)
        return F.linear(x, self.weight_v) * gain.T


class Prototypes(nn.Linear):
    """K unit vectors, (B, D) -> (B, K) products; ``normalise``, after an optimiser step, makes them unit again."""

    def __init__(self, dim: int, prototypes: int):
        super().__init__(dim, prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))  # similarities are float32, whatever the weights are loaded in

    @torch.no_grad()
    def normalise(self) -> None:
        self.weight.copy_(F.normalize(self.weight, dim=1))


class DINOHead(nn.Module):
    """DINO's projection head (DINO, appendix C): MLP with GELU, L2 bottleneck, weight-normalised prototypes.

    (B, in_dim) -> (B, out_dim) logits. Parameter names are those of the official state dict. weight_norm: False makes
    the prototypes a plain bias-free linear layer, as DINOv3 does.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: int = 3,
        use_bn: bool = False,
        weight_norm: bool = True,
    ):
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (max(nlayers, 1) - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for index, (inner, outer) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(inner, outer))
            if index < len(widths) - 2:
                layers += [nn.BatchNorm1d(outer)] if use_bn else []
                layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        last = WeightNormLinear if weight_norm else partial(nn.Linear, bias=False)
        self.last_layer: nn.Module = last(bottleneck_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.mlp(x), dim=-1)
        return self.last_layer(x)


class TransformerDecoder(nn.Module):
    """A small ViT decoder made of native ``ViTLayer`` blocks: embed, add positions, blocks, norm, predict.

    Input: (B, N, in_dim) tokens (mask tokens are added by the caller through ``embed``); output (B, N, out_dim).
    """

    def __init__(self, in_dim: int, out_dim: int, config: ViTConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(in_dim, config.hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.predict = nn.Linear(config.hidden_size, out_dim)

    def forward(self, tokens: Tensor, wanted: Tensor | None = None) -> Tensor:
        """tokens: (B, N, hidden) already embedded, with positions. -> (B, N, out_dim), or of the ``wanted`` (B, M)
        positions alone: (B, M, out_dim)."""
        for layer in self.layers:
            tokens = layer(tokens)
        if wanted is not None:
            tokens = tokens.gather(1, wanted.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        return self.predict(self.norm(tokens))


def spare(module: nn.Module) -> None:
    """Drops the module's gradients, so that the coming optimiser step leaves it as it is."""
    for parameter in module.parameters():
        parameter.grad = None


def init_fused(module: nn.Linear, parts: int) -> None:
    """Xavier-uniform as one of ``parts`` layers that the published code holds, and initialises, as a single matrix."""
    bound = math.sqrt(6 / (parts * module.out_features + module.in_features))
    init.uniform_(module.weight, -bound, bound)


def init_head(module: Any, std: float = 0.02, xavier: bool = False) -> None:
    """Initialise one module of a head: truncated normal linears (or Xavier-uniform ones, patch embeddings too), zero
    biases, unit norms, unit prototypes.

    Uses transformers' guarded initialisers: values that came from a checkpoint stay.
    """
    if isinstance(module, nn.Linear):
        if xavier:
            init.xavier_uniform_(module.weight)
        else:
            init.trunc_normal_(module.weight, std=std, a=-2.0, b=2.0)
        if module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, Prototypes):
            init.copy_(module.weight, F.normalize(module.weight, dim=1))
    elif isinstance(module, nn.Conv2d) and xavier:  # a patch embedding, as the linear layer that it is
        bound = math.sqrt(6 / (module.weight[0].numel() + module.out_channels))
        init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)):
        if module.weight is not None:
            init.ones_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
        for name, statistic in module.named_buffers(recurse=False):
            (init.ones_ if name == "running_var" else init.zeros_)(statistic)
    elif isinstance(module, WeightNormLinear):
        init.ones_(module.weight_g)
        init.trunc_normal_(module.weight_v, std=std, a=-2.0, b=2.0)
    elif isinstance(module, TransformerDecoder):
        init.normal_(module.mask_token, std=std)
