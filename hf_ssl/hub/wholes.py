"""Official training checkpoints as whole methods of ours: heads, teacher, centre, decoder, if a file has them all."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backbones
from ..methods import load
from ..modeling import SSLModel
from .checkpoints import CheckpointError
from .natives import DEEPEST, Native, block_places, filled, split

_COUNTERS = r"^(step|total_steps|center\.sum|center\.count)$|num_batches_tracked$|embeddings\.mask_token$"


@dataclass(frozen=True)
class Parts:
    """tensors: of the whole file. natives: prefix of each backbone in it -> its native model. chosen: prefix of the
    one that is converted. fields: config fields that the training arguments tell."""

    tensors: Mapping[str, Tensor]
    natives: Mapping[str, Native]
    chosen: str
    fields: Mapping[str, Any]
    decoder_num_heads: int | None = None

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def backbone(self, prefix: str, name: str) -> dict[str, Tensor]:
        state = self.natives[prefix].model.base_model.state_dict()
        return {f"{name}.{key}": tensor for key, tensor in state.items()}


class NotWholeError(CheckpointError):
    """Why a checkpoint makes no whole method; its backbone may be converted all the same."""


def whole(method: str, parts: Parts) -> tuple[SSLModel, dict[str, list[str]]]:
    """The method's model with the file's weights, and where each tensor beside the backbone went.

    Raises NotWholeError where the file does not hold all that training would go on with.
    """
    make = MAKERS.get(method)
    if make is None:
        raise NotWholeError(
            "the heads of this method's released files are not read, so only its backbone is converted"
        )
    config, state, names = make(parts)
    kind: Any = load(method)
    try:
        return filled(lambda: kind(kind.config_class(**config)), state, _COUNTERS), names
    except CheckpointError as error:
        raise NotWholeError(str(error)) from None


def _dino(parts: Parts) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, list[str]]]:
    roots = {"backbone": "student.backbone.", "teacher_backbone": "teacher.backbone."}
    heads = {"head": "student.head.", "teacher_head": "teacher.head."}
    if not all(root in parts.natives for root in roots.values()) or not all(map(parts.under, heads.values())):
        raise NotWholeError("the file holds a backbone without student, teacher and heads, so there is no ssl/")
    state: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for ours, root in roots.items():
        state |= parts.backbone(root, ours)
    for ours, prefix in heads.items():
        for name, tensor in parts.under(prefix).items():
            # torch's newer weight norm keeps gain and direction under other names
            own = re.sub(r"parametrizations\.weight\.original([01])$", lambda k: f"weight_{'gv'[int(k[1])]}", name)
            state[f"{ours}.{own}"], names[f"{prefix}{name}"] = tensor, [f"{ours}.{own}"]
    center = next((name for name in ("dino_loss.center", "center") if name in parts.tensors), None)
    prototypes = state.get("head.last_layer.weight_v")
    if center is None or prototypes is None:
        raise NotWholeError("the file holds no centre or no head as DINO's, so there is no ssl/")
    state["center.value"], names[center] = parts.tensors[center], ["center.value"]
    mlp = [t for name, t in state.items() if re.fullmatch(r"head\.mlp\.(\d+\.)?weight", name) and t.ndim == 2]
    config: dict[str, Any] = {
        "out_dim": prototypes.shape[0], "bottleneck_dim": prototypes.shape[1], "num_layers": len(mlp),
        "hidden_dim": mlp[0].shape[0], "use_bn_in_head": any("head.mlp" in n and "running_mean" in n for n in state),
    }  # fmt: skip
    native = parts.natives[roots["backbone"]].model
    return {**config, **parts.fields, "backbone_config": native.config.to_dict()}, state, names


def _mae(parts: Parts) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, list[str]]]:
    decoder = {n: t for n, t in parts.under(parts.chosen).items() if n == "mask_token" or n.startswith("decoder_")}
    if not {"decoder_embed.weight", "decoder_blocks.0.mlp.fc1.weight", "decoder_pos_embed"} <= decoder.keys():
        raise NotWholeError("the file holds the encoder without its decoder, so there is no ssl/")
    width, inner = decoder["decoder_embed.weight"].shape[0], decoder["decoder_blocks.0.mlp.fc1.weight"].shape[0]
    heads = parts.decoder_num_heads or width // 32  # MAE's decoders: 512 wide, 16 heads
    if not heads or width % heads:
        raise NotWholeError(
            f"no tensor tells the heads of a decoder {width} wide: with --decoder_num_heads there is an ssl/"
        )
    layers = len({name.split(".")[1] for name in decoder if name.startswith("decoder_blocks.")})
    if layers > DEEPEST:
        raise NotWholeError(f"a decoder of {layers} blocks is none of MAE's, so there is no ssl/")
    places = {name: _mae_places(name) for name in decoder}
    state = parts.backbone(parts.chosen, "backbone")
    for name, found in places.items():
        state |= dict(split(decoder[name], found))
    native = parts.natives[parts.chosen].model
    embeddings: Any = native.base_model.embeddings
    positions = embeddings.position_embeddings[0]
    grid = [side // native.config.patch_size for side in backbones.image_size(native.config)]
    if native.config.hidden_act != "gelu":
        raise NotWholeError(
            f"MAE's decoder has GELU, so with --hidden_act {native.config.hidden_act} there is no ssl/"
        )
    fixed = torch.allclose(positions, backbones.sincos_2d(positions.shape[1], (grid[0], grid[1]), prefix=1), atol=1e-4)
    config: dict[str, Any] = {
        "decoder_hidden_size": width, "decoder_num_heads": heads, "decoder_intermediate_size": inner,
        "decoder_num_layers": layers, "fixed_positions": fixed,
    }  # fmt: skip
    config |= {**parts.fields, "backbone_config": native.config.to_dict()}
    return config, state, {f"{parts.chosen}{name}": found for name, found in places.items()}


_MAE_NAMES = {
    "mask_token": "decoder.mask_token", "decoder_pos_embed": "decoder_positions", "decoder_embed": "decoder.embed",
    "decoder_norm": "decoder.norm", "decoder_pred": "decoder.predict",
}  # fmt: skip


def _mae_places(name: str) -> list[str]:
    if name in _MAE_NAMES:
        return [_MAE_NAMES[name]]
    if found := re.fullmatch(r"decoder_blocks\.(\d+)\.(.+)", name):
        return [f"decoder.layers.{found[1]}.{place}" for place in block_places(found[2]) or [found[2]]]
    stem, _, leaf = name.rpartition(".")
    return [f"{_MAE_NAMES.get(stem, stem)}.{leaf}"]


def _simclr(parts: Parts) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, list[str]]]:
    """A projector of linear layers, each with a BatchNorm; a bias before a BatchNorm moves into its mean, exactly."""
    prefix = next((p for p in ("projector.", "projection_head.layers.", "projection_head.") if parts.under(p)), "")
    given = parts.under(prefix) if prefix else {}
    linears = sorted(
        int(n.split(".")[0]) for n, t in given.items() if n.endswith("weight") and t.ndim == 2 and n[0].isdigit()
    )
    if not linears or linears != list(range(0, 3 * len(linears), 3)) or len(linears) < 2:
        raise NotWholeError("its projector is not linear layers with BatchNorm, ReLU between: there is no ssl/")
    state, names = parts.backbone(parts.chosen, "backbone"), {}
    for name, tensor in given.items():
        index, _, leaf = name.partition(".")
        if leaf == "running_mean" and (bias := given.get(f"{int(index) - 1}.bias")) is not None:
            tensor = tensor - bias
        names[f"{prefix}{name}"] = [f"projector.{name}"]
        if int(index) in linears and leaf == "bias":
            names[f"{prefix}{name}"] = [f"projector.{int(index) + 1}.running_mean"]
        elif name == f"{linears[-1] + 1}.bias":
            if bool(tensor.any()):
                raise NotWholeError("its projector ends with a shift, which SimCLR's has not: there is no ssl/")
        else:
            state[f"projector.{name}"] = tensor
    hidden, out = given["0.weight"].shape[0], given[f"{linears[-1]}.weight"].shape[0]
    config: dict[str, Any] = {"projection_dim": out, "hidden_dim": hidden, "num_layers": len(linears)}
    return {**config, "backbone_config": parts.natives[parts.chosen].model.config.to_dict()}, state, names


MAKERS: dict[str, Callable[[Parts], tuple[dict[str, Any], dict[str, Tensor], dict[str, list[str]]]]] = {
    "dino": _dino,
    "mae": _mae,
    "simclr": _simclr,
}
