"""State dicts with the names of torchvision, timm and the official ViTs, as native transformers models.

Sizes are read from the tensors. What they cannot tell (attention heads, a convolutional network's image size) is an
argument, or a rule that the notes state.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.activations import ACT2FN

from .. import backbones
from ..loading import from_config
from .checkpoints import CheckpointError

_HEADS_OF_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # SO400M, ViT-H, ViT-g, ViT-G: not 64 wide
DEEPEST, _LARGEST = 500, 2048  # blocks, pixels: no released model has more, and a few bytes could claim them
_KNOWN = "a ResNet with torchvision's names or a ViT with timm's, torchvision's or DINOv2's"


@dataclass
class Native:
    """model: with the file's weights, in eval mode. names: given name -> native name(s). rest: given names that no
    part of it takes. about: its sizes in words. notes: heads that were assumed; assumed: all else that was."""

    model: PreTrainedModel
    family: str
    names: dict[str, list[str]]
    rest: list[str]
    about: str
    notes: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sizes:
    """What no tensor tells: attention heads, heads by width of this method, (height, width) in pixels, LayerNorm's
    eps, the activation by transformers' name."""

    num_heads: int | None = None
    heads: Mapping[int, int] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    layer_norm_eps: float | None = None
    hidden_act: str | None = None


def roots(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Prefix -> family ("resnet", "vit", "dinov2", "ijepa") of every backbone among ``tensors``."""
    found = {}
    for name in tensors:
        stem = re.fullmatch(r"(|.*\.)(patch_embed\.proj|conv_proj|conv1|0)\.weight", name)
        if stem is None:
            continue
        prefix, part = stem[1], stem[2]
        if part in ("conv1", "0"):
            if f"{prefix}{'layer1' if part == 'conv1' else '4'}.0.conv1.weight" in tensors:
                found[prefix] = "resnet"
        elif any(re.match(re.escape(prefix) + r"blocks\.[\d.]*ls1\.gamma$", other) for other in tensors):
            found[prefix] = "dinov2"
        else:
            is_pooled = not {f"{prefix}cls_token", f"{prefix}class_token"} & tensors.keys()
            found[prefix] = "ijepa" if is_pooled else "vit"
    return found


def convert(tensors: Mapping[str, Tensor], family: str, sizes: Sizes, classifier: bool = False) -> Native:
    """The native model of ``tensors`` (one backbone's, names relative to it).

    classifier: keep a linear classifier as a native ``ForImageClassification``. Raises CheckpointError if a tensor is
    missing, has another shape than the architecture gives it, or would change the features and has no native place.
    """
    renamed = {_plain_name(name, family): name for name in tensors}
    if len(renamed) != len(tensors):
        twice = set(tensors) - set(renamed.values())
        raise CheckpointError(f"{listed(sorted(twice))} and another tensor mean the same part of the backbone.")
    state = {plain: tensors[name] for plain, name in renamed.items()}
    if family == "resnet":
        config, places, about = _resnet(state)
        notes: list[str] = []
        assumed = _resnet_notes(sizes)
    else:
        config, places, about, notes, assumed = _transformer(state, family, sizes)
    head = next((name for name in ("head", "fc") if f"{name}.weight" in state), None)
    is_linear = head is not None and state[f"{head}.weight"].ndim == 2 and f"{head}.bias" in state
    if classifier and is_linear and family in ("resnet", "vit"):
        config["num_labels"] = len(state[f"{head}.weight"])
        make: Callable[[], Any] = partial(from_config, AutoModelForImageClassification, AutoConfig.for_model(**config))
        places = {name: [f"{family}.{place}" for place in found] for name, found in places.items()}
        for leaf in ("weight", "bias"):
            places[f"{head}.{leaf}"] = [f"classifier.{'1.' if family == 'resnet' else ''}{leaf}"]
        about += f", a classifier of {config['num_labels']} classes"
    else:
        make = partial(backbones.build, AutoConfig.for_model(**config))
    structure = [name for name in state if name not in places and not _OUTSIDE[family == "resnet"].match(name)]
    if structure:
        raise CheckpointError(
            f"{listed(structure)} would change the features and has no place in a native {family} model: convert "
            f"knows {_KNOWN}."
        )
    model = filled(make, {place: part for name, found in places.items() for place, part in split(state[name], found)})
    names = {renamed[name]: found for name, found in places.items()}
    rest = [renamed[name] for name in state if name not in places]
    return Native(model, family, names, rest, about, notes, assumed)


def filled(
    make: Callable[[], Any],
    state: Mapping[str, Tensor],
    optional: str = r"num_batches_tracked$|embeddings\.mask_token$",
) -> Any:
    """The model that ``make`` builds, with ``state`` copied into it, cast, in eval mode.

    Every shape must fit and only ``optional`` may be missing, which is found out before any memory is taken: a few
    small tensors can name a huge model. Raises CheckpointError.
    """
    with torch.device("meta"):
        probe = make()
    own, kind = {name: tensor.shape for name, tensor in probe.state_dict().items()}, type(probe).__name__
    wrong = [f"{n} {tuple(t.shape)} for {tuple(own[n])}" for n, t in state.items() if n in own and own[n] != t.shape]
    missing = [name for name in own if name not in state and not re.search(optional, name)]
    unexpected = [name for name in state if name not in own]
    for names, what in ((missing, "is missing"), (unexpected, "has no place"), (wrong, "is the wrong shape")):
        if names:
            raise CheckpointError(f"The tensors do not make a {kind}: {listed(names)} {what}.")
    model = make()
    model.load_state_dict(dict(state), strict=False)
    return model.eval()


def split(tensor: Tensor, places: list[str]) -> list[tuple[str, Tensor]]:
    """A tensor, or the equal parts of a fused one, by where they go."""
    return list(zip(places, tensor.chunk(len(places)) if places[1:] else [tensor], strict=True))


def listed(names: list[str], limit: int = 6) -> str:
    """``a, b, c and 4 more``."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more


# --- names --------------------------------------------------------------------------------------------------------

_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}  # lightly's
_TORCHVISION_VIT = {  # torchvision's names -> timm's
    r"^class_token$": "cls_token",
    r"^conv_proj\.": "patch_embed.proj.",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"^encoder\.ln\.": "norm.",
    r"^heads\.head\.": "head.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.(0|linear_1)\.": ".mlp.fc1.",
    r"\.mlp\.(3|linear_2)\.": ".mlp.fc2.",
}
_OUTSIDE = {  # heads and states that official code keeps beside a backbone: left out, the features do not need them
    True: re.compile(r"(?!(conv|bn)\d|layer\d|downsample|stem|maxpool)"),
    False: re.compile(
        r"(?!cls|class_token|dist_token|reg|pos|patch|blocks|layers|norm|fc_norm|conv|rope|rel_pos|encoder\.|attn_pool)"
    ),
}


def _plain_name(name: str, family: str) -> str:
    if family == "resnet":
        first, dot, rest = name.partition(".")
        return f"{_SEQUENTIAL.get(first, first)}{dot}{rest}"
    for pattern, timm in _TORCHVISION_VIT.items():
        name = re.sub(pattern, timm, name)
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # DINOv2 trains its blocks in chunks
    return "register_tokens" if name == "reg_token" else name


def _resnet(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, list[str]], str]:
    """(config, places, about) of a ResNet with torchvision's names."""
    stem = state["conv1.weight"]
    if stem.shape[-1] != 7:
        raise CheckpointError(
            f"conv1 is {stem.shape[-2]}x{stem.shape[-1]}, as in ResNets for small pictures; the native ResNet begins "
            "with 7x7 and a pooling."
        )
    stages = sorted({int(found[1]) for name in state if (found := re.match(r"layer(\d)\.", name))})
    depths = [len({name.split(".")[1] for name in state if name.startswith(f"layer{i}.")}) for i in stages]
    if sum(depths) > DEEPEST:
        raise CheckpointError(f"A ResNet of {sum(depths)} blocks is none that convert knows.")
    is_bottleneck = "layer1.0.conv3.weight" in state
    last = "conv3" if is_bottleneck else "conv2"
    widths = [_need(state, f"layer{i}.0.{last}.weight").shape[0] for i in stages]
    places = {name: [place] for name in state if (place := _resnet_place(name)) is not None}
    config = {
        "model_type": "resnet", "num_channels": stem.shape[1], "embedding_size": stem.shape[0],
        "hidden_sizes": widths, "depths": depths, "layer_type": "bottleneck" if is_bottleneck else "basic",
    }  # fmt: skip
    layers = 2 + sum(depths) * (3 if is_bottleneck else 2)
    return config, places, f"ResNet-{layers}, {widths[-1]} wide, {stem.shape[1]} channels"


def _resnet_notes(sizes: Sizes) -> list[str]:
    if sizes.layer_norm_eps is not None or sizes.num_heads is not None or sizes.hidden_act not in (None, "relu"):
        raise CheckpointError("A ResNet has no LayerNorm and no attention heads, and its activation is ReLU.")
    return ["BatchNorm's eps 1e-05, ReLU and the stride in a block's 3x3 convolution assumed, as torchvision has them"]


def _resnet_place(name: str) -> str | None:
    if found := re.fullmatch(r"(conv1|bn1)\.(\w+)", name):
        return f"embedder.embedder.{'convolution' if found[1] == 'conv1' else 'normalization'}.{found[2]}"
    found = re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(\w+)", name)
    if found is None:
        return None
    stage, block, kind, number, leaf = found.groups()
    layer = f"encoder.stages.{int(stage) - 1}.layers.{block}"
    if kind == "downsample.":
        return f"{layer}.shortcut.{'normalization' if number == '1' else 'convolution'}.{leaf}"
    return f"{layer}.layer.{int(number) - 1}.{'convolution' if kind == 'conv' else 'normalization'}.{leaf}"


# --- transformers -------------------------------------------------------------------------------------------------

_EMBEDDINGS = {
    "cls_token": "cls_token", "pos_embed": "position_embeddings", "register_tokens": "register_tokens",
    "mask_token": "mask_token", "patch_embed.proj.weight": "patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "patch_embeddings.projection.bias",
}  # fmt: skip
_BLOCK = {
    "norm1": ["layernorm_before"], "norm2": ["layernorm_after"], "attn.proj": ["attention.o_proj"],
    "attn.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"], "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}  # fmt: skip
_DINOV2_BLOCK = {
    **_BLOCK, "norm1": ["norm1"], "norm2": ["norm2"], "ls1": ["layer_scale1"], "ls2": ["layer_scale2"],
    "mlp.w12": ["mlp.gate_proj", "mlp.up_proj"], "mlp.w3": ["mlp.down_proj"],
}  # fmt: skip


def block_places(name: str, block: Mapping[str, list[str]] = _BLOCK) -> list[str] | None:
    """Where a block's tensor (``attn.qkv.weight``) lies in the native block: one name, or one for each part."""
    stem, _, leaf = name.rpartition(".")
    if stem not in block:
        return None
    return [f"{place}.{'lambda1' if leaf == 'gamma' else leaf}" for place in block[stem]]


def _transformer(
    state: dict[str, Tensor], family: str, sizes: Sizes
) -> tuple[dict[str, Any], dict[str, list[str]], str, list[str], list[str]]:
    """(config, places, about, notes, assumed) of a ViT with timm's names; ``state`` gets a position that it lacks."""
    patch, positions = _need(state, "patch_embed.proj.weight"), _need(state, "pos_embed")
    if patch.ndim != 4 or patch.shape[2] != patch.shape[3] or positions.ndim != 3:
        raise CheckpointError(f"patch_embed.proj.weight {tuple(patch.shape)} has no square patches of pictures.")
    width, channels, side = patch.shape[0], patch.shape[1], patch.shape[2]
    grid, is_bare = _grid(positions.shape[1], int("cls_token" in state), side, sizes.image_size)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    is_gated = "blocks.0.mlp.w12.weight" in state
    inner = _need(state, "blocks.0.mlp.w3.weight" if is_gated else "blocks.0.mlp.fc1.weight").shape[int(is_gated)]
    if max(depth, max(grid) * side / _LARGEST * DEEPEST) > DEEPEST:
        raise CheckpointError(
            f"A ViT of {depth} blocks for {grid[0] * side}x{grid[1] * side} pixels is none that convert knows."
        )
    heads, notes = _attention_heads(width, sizes)
    eps, act, assumed = _eps_and_activation(sizes, is_gated)
    layer, block = ("encoder.layer", _DINOV2_BLOCK) if family == "dinov2" else ("layers", _BLOCK)
    places: dict[str, list[str]] = {}
    for name in state:
        own = (family == "dinov2") or name not in ("mask_token", "register_tokens")
        if name in _EMBEDDINGS and own:
            places[name] = [f"embeddings.{_EMBEDDINGS[name]}"]
        elif name in ("norm.weight", "norm.bias"):
            places[name] = [f"layer{name}"]
        elif found := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            inside = block_places(found[2], block)
            if inside is not None:
                places[name] = [f"{layer}.{found[1]}.{place}" for place in inside]
    if is_bare:  # as timm trains DeiT III and register ViTs: the class token has no position
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    pixels = [rows * side for rows in grid]
    config: dict[str, Any] = {
        "model_type": family, "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "image_size": pixels[0] if pixels[0] == pixels[1] else pixels, "patch_size": side, "num_channels": channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state, "layer_norm_eps": eps, "hidden_act": act,
    }  # fmt: skip
    if sizes.image_size is None and grid != (1, 1):
        assumed.append(
            f"positions assumed to be a square, row by row, so pictures of {pixels[0]}x{pixels[1]}; --image_size says "
            "otherwise"
        )
    config |= _dinov2_fields(state, width, inner, is_gated) if family == "dinov2" else {"intermediate_size": inner}
    registers = f", {config['num_register_tokens']} registers" if "num_register_tokens" in config else ""
    about = f"ViT, {depth} layers, {width} wide, {heads} heads, patch {side}{registers}, {pixels[0]}x{pixels[1]} px"
    return config, places, f"{about}, {channels} channels", notes, assumed


def _dinov2_fields(state: Mapping[str, Tensor], width: int, inner: int, is_gated: bool) -> dict[str, Any]:
    ratio = 4 if is_gated else inner / width  # DINOv2's gated width follows from 4; fill() holds it against the file's
    if ratio != int(ratio):
        raise CheckpointError(
            f"blocks.0.mlp.fc1 is {ratio:g} times as wide as the model; Dinov2Model needs a whole number."
        )
    fields: dict[str, Any] = {"mlp_ratio": int(ratio), "use_swiglu_ffn": is_gated}
    if "register_tokens" in state:
        fields |= {"model_type": "dinov2_with_registers", "num_register_tokens": state["register_tokens"].shape[1]}
    return fields


def _grid(count: int, prefix: int, side: int, image_size: tuple[int, int] | None) -> tuple[tuple[int, int], bool]:
    """((rows, columns), whether the table lacks the class token's row) of a table of ``count`` positions."""
    for is_bare in (False, True)[: 1 + prefix]:
        patches = count - (0 if is_bare else prefix)
        if image_size is not None:
            rows, columns = image_size[0] // side, image_size[1] // side
        else:
            rows = columns = math.isqrt(patches)
        if rows * columns == patches:
            return (rows, columns), is_bare
    asked = (
        f"--image_size {image_size[0]},{image_size[1]} gives another number" if image_size else "they are no square"
    )
    raise CheckpointError(
        f"pos_embed has {count - prefix} patches of {side}x{side} and {asked}: give --image_size HEIGHT,WIDTH."
    )


def _attention_heads(width: int, sizes: Sizes) -> tuple[int, list[str]]:
    """Heads are views of one matrix, so no tensor tells how many there are."""
    if sizes.num_heads is not None:
        if width % sizes.num_heads:
            raise CheckpointError(f"--num_heads {sizes.num_heads} does not divide the width, {width}.")
        return sizes.num_heads, []
    heads = {**_HEADS_OF_WIDTH, **sizes.heads}.get(width)
    if heads is None and width % 64:
        raise CheckpointError(
            f"The tensors do not tell how many attention heads a ViT has, and a width of {width} is no multiple of "
            "the usual 64: give --num_heads."
        )
    heads = heads or width // 64
    return heads, [
        f"{heads} attention heads assumed, the published number at {width} wide; --num_heads says otherwise"
    ]


def _eps_and_activation(sizes: Sizes, is_gated: bool) -> tuple[float, str, list[str]]:
    """(LayerNorm's eps, activation, what was assumed). Weights show neither; a wrong one shifts every feature."""
    eps, act, assumed = sizes.layer_norm_eps, sizes.hidden_act, []
    if eps is None:
        eps = 1e-6
        assumed.append(
            "LayerNorm's eps 1e-06 assumed, as official ViTs, timm, torchvision have it (torch's default is 1e-05); "
            "--layer_norm_eps says otherwise"
        )
    elif not 0 < eps < 1:
        raise CheckpointError(f"--layer_norm_eps must lie between 0 and 1, not {eps:g}.")
    if is_gated:
        if act not in (None, "silu"):
            raise CheckpointError(f"A gated ViT (SwiGLU) has SiLU, not {act}: leave --hidden_act out.")
        return eps, "gelu", assumed  # what the native config says where the gate decides
    if act is None:
        act = "gelu"
        assumed.append("the exact GELU assumed as activation; --hidden_act says otherwise")
    elif act not in ACT2FN:
        raise CheckpointError(f"transformers has no --hidden_act {act}; it has {listed(list(ACT2FN), 8)}.")
    return eps, act, assumed


def _need(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise CheckpointError(f"{name} is missing: convert knows {_KNOWN}.")
    return state[name]
