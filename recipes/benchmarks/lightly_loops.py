"""lightly's side of the benchmarks: the loops of its documentation, its modules, losses and transforms.

Each class is one page of https://docs.lightly.ai/self-supervised-learning/examples/ with our settings' names; the
backbone is the native model that our side trains, for MAE timm's ViT of the same sizes, which is what lightly masks.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import RandomErasing

from hf_ssl import backbones, schedules
from hf_ssl.processing.views import ViewGroup

Settings = dict[str, Any]  # of the recipe and its defaults, by our names


class SimCLR(nn.Module):
    def __init__(self, backbone: Any, s: Settings):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        super().__init__()
        width = backbones.feature_dim(backbone)
        self.backbone = backbone
        self.head = SimCLRProjectionHead(width, s["hidden_dim"] or width, s["projection_dim"], s["num_layers"])
        self.criterion = NTXentLoss(s["temperature"])

    def loss(self, views: list[Tensor], share: float) -> Tensor:
        """views: two (B, C, H, W); share: of the run that is done."""
        first, second = (self.head(backbones.features(self.backbone, view)) for view in views)
        return self.criterion(first, second)

    def export(self) -> nn.Module:
        return self.backbone


class DINO(nn.Module):
    def __init__(self, backbone: Any, s: Settings):
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        sizes = (backbones.feature_dim(backbone), s["hidden_dim"], s["bottleneck_dim"], s["out_dim"])
        self.momentum, self.temperature = s["teacher_momentum"], s["teacher_temperature"]
        self.backbone, self.head = backbone, DINOProjectionHead(*sizes, batch_norm=s["use_bn_in_head"])
        self.teacher_backbone = copy.deepcopy(backbone)
        self.teacher_head = DINOProjectionHead(*sizes, batch_norm=s["use_bn_in_head"])
        self.teacher_head.load_state_dict(self.head.state_dict())
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(s["out_dim"], self.temperature, self.temperature, 1)

    def loss(self, views: list[Tensor], share: float) -> Tensor:
        """views: two large crops, then small ones."""
        from lightly.models.utils import update_momentum

        momentum = schedules.cosine(share, self.momentum, 1.0)
        update_momentum(self.backbone, self.teacher_backbone, m=momentum)
        update_momentum(self.head, self.teacher_head, m=momentum)
        with torch.no_grad():
            teacher = [self.teacher_head(backbones.features(self.teacher_backbone, view)) for view in views[:2]]
        student = [self.head(backbones.features(self.backbone, view)) for view in views]
        return self.criterion(teacher, student)

    def export(self) -> nn.Module:
        return self.teacher_backbone


class MAE(nn.Module):
    def __init__(self, backbone: Any, s: Settings):
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.layers import set_fused_attn
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        set_fused_attn(s["attn_implementation"] != "eager")  # as our side: bf16 sdpa is slow on a CPU
        c, hidden = backbone.config, s["decoder_hidden_size"]
        vit = VisionTransformer(
            c.image_size, c.patch_size, c.num_channels, 0, embed_dim=c.hidden_size, depth=c.num_hidden_layers,
            num_heads=c.num_attention_heads, mlp_ratio=c.intermediate_size / c.hidden_size,
        )  # fmt: skip
        self.ratio, self.patch, self.norm_pix = s["mask_ratio"], c.patch_size, s["norm_pix_loss"]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.length = self.backbone.sequence_length
        self.decoder = MAEDecoderTIMM(
            vit.patch_embed.num_patches, c.patch_size, c.num_channels, c.hidden_size, hidden, s["decoder_num_layers"],
            s["decoder_num_heads"], mlp_ratio=s["decoder_intermediate_size"] / hidden,
        )  # fmt: skip

    def loss(self, views: list[Tensor], share: float) -> Tensor:
        """views: one (B, C, H, W)."""
        from lightly.models import utils

        images = views[0]
        keep, masked = utils.random_token_mask((len(images), self.length), self.ratio, device=images.device)
        encoded = self.decoder.embed(self.backbone.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), self.length))
        tokens = utils.set_at_index(tokens.type_as(encoded), keep, encoded)
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, self.patch), masked - 1)
        if self.norm_pix:
            target = utils.normalize_mean_var(target, dim=-1)
        return F.mse_loss(predicted.float(), target)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class token (B, D) and patch tokens (B, N, D)."""
        tokens = self.backbone.encode(images)
        return tokens[:, 0], tokens[:, 1:]


LOOPS = {"simclr": SimCLR, "dino": DINO, "mae": MAE}


def settings(plan: Any, trainer: Any) -> Settings:
    """Every setting of our run by name: the fields of its first view group, of its config and of its training."""
    groups = [dataclasses.asdict(ViewGroup((1, 1))) | group for group in trainer.processing_class.views]
    training = {**trainer.args.to_dict(), **plan.group("training"), "learning_rate": trainer.args.learning_rate}
    attention = {"attn_implementation": plan.group("model").get("attn_implementation")}
    return {**trainer.method.config.to_dict(), **attention, **training, **groups[0], "groups": groups}


def transform(method: str, s: Settings, processor: Any) -> Callable[[Any], list[Tensor]]:
    """lightly's transform of the method, set as our views are where it has the setting."""
    from lightly import transforms

    size, normalise = processor.size["height"], {"mean": processor.image_mean, "std": processor.image_std}
    if method == "mae":  # has no parameter for how often it mirrors
        views = transforms.MAETransform(size, (s["scale"] or [1.0])[0], normalise)
        views.transform.transforms[1].p = s["hflip"]
        return views
    colour = {
        "hf_prob": s["hflip"], "cj_prob": s["jitter_p"], "cj_strength": 1.0, "cj_bright": _amount(s["brightness"]),
        "cj_contrast": _amount(s["contrast"]), "cj_sat": _amount(s["saturation"]), "cj_hue": _amount(s["hue"]),
        "random_gray_scale": s["grayscale_p"], "rr_prob": float(s["rotation"] > 0),
        "rr_degrees": s["rotation"] or None, "normalize": normalise,
    }  # fmt: skip
    if method == "simclr":
        return _erase(
            transforms.SimCLRTransform(size, min_scale=s["scale"][0], gaussian_blur=s["blur_p"], **colour), s
        )
    large = [group for group in s["groups"] if group["key"] == "pixel_values"]
    small = next((g for g in s["groups"] if g["key"] != "pixel_values"), {**s, "size": size, "count": 0})
    local = (small["size"] if isinstance(small["size"], int) else small["size"][0], tuple(small["scale"]))
    views = transforms.DINOTransform(
        size, tuple(s["scale"]), *local, small["count"], solarization_prob=large[-1]["solarize_p"],
        gaussian_blur=(large[0]["blur_p"], large[-1]["blur_p"], small["blur_p"]), **colour,
    )  # fmt: skip
    return _erase(views, s)


def _erase(views: Any, s: Settings) -> Any:
    """torchvision's erasing after the last step of every view: lightly's transforms have none."""
    if s["erase_p"]:
        for pipeline in {id(view): view.transform for view in views.transforms}.values():
            pipeline.transforms.append(RandomErasing(s["erase_p"], tuple(s["erase_scale"])))
    return views


def _amount(value: Any) -> float:
    """ColorJitter's one number: of a range around 1, or around 0 for hue, its half width."""
    return value if isinstance(value, (int, float)) else (value[1] - value[0]) / 2


class Pictures(torch.utils.data.Dataset):
    """Decoded pictures (H, W, C) uint8, or functions that decode one, through a transform."""

    def __init__(self, pictures: list[Any], views: Callable[[Any], list[Tensor]]):
        self.pictures, self.views = pictures, views

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> list[Tensor]:
        picture = self.pictures[i]
        return self.views(picture() if callable(picture) else Image.fromarray(np.squeeze(picture)))


def batches(pictures: Pictures, batch_size: int, num_workers: int = 0) -> Iterator[list[Tensor]]:
    """Endless shuffled batches, a list of views (B, C, H, W) each."""
    loader = torch.utils.data.DataLoader(
        pictures, batch_size, shuffle=True, drop_last=True, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    while True:
        yield from loader


def optimiser(module: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """The class that the recipe trains with, over all trainable parameters."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    shared = {"lr": s["learning_rate"], "weight_decay": s["weight_decay"]}
    if s["optim"] == "sgd_nesterov":
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **shared)
    return torch.optim.AdamW(parameters, betas=(0.9, s.get("adam_beta2", 0.999)), fused=True, **shared)
