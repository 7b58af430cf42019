"""MAE: encode a quarter of the patches, predict the pixels of the rest from it (He et al. 2021, 2111.06377).

Teaches that a high mask ratio makes pixel prediction a meaningful task and training cheap; made for fine-tuning.
Siblings: SimMIM and BEiT feed mask tokens through the whole encoder; data2vec and I-JEPA predict features, not pixels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import ViTConfig
from transformers import initialization as init

from ... import backbones, heads, masks
from ...modeling import Paper, SSLConfig, SSLModel, SSLOutput
from ...processing import SSLImageProcessor


@strict
class MAEConfig(SSLConfig):
    """mask_ratio: share of patches removed, kept = int(N · (1 − ratio)). norm_pix_loss: predict normalised patches.
    fixed_positions: 2-D sin-cos codes in the encoder, never trained; False keeps the backbone's own learned ones."""

    model_type = "ssl_mae"

    mask_ratio: float | int = 0.75
    norm_pix_loss: bool = True
    fixed_positions: bool = True
    decoder_hidden_size: int = 512
    decoder_num_layers: int = 8
    decoder_num_heads: int = 16
    decoder_intermediate_size: int = 2048
    limits = {
        "decoder_hidden_size": "[1, inf)", "decoder_num_layers": "[1, inf)", "decoder_num_heads": "[1, inf)",
        "decoder_intermediate_size": "[1, inf)",
    }  # fmt: skip

    def __post_init__(self, **kwargs):
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {self.mask_ratio}")
        super().__post_init__(**kwargs)


class MAEImageProcessor(SSLImageProcessor):
    """One random crop and a flip, no colour (appendix A.1)."""

    views: ClassVar = [
        {"key": "pixel_values", "count": 1, "scale": [0.2, 1.0], "hflip": 0.5, "interpolation": "bicubic"}
    ]


class MAEForPreTraining(SSLModel):
    """Native ViT over visible patches → linear → decoder over all patches → pixels."""

    config: MAEConfig
    processor_class = MAEImageProcessor
    paper = Paper(
        name="MAE",
        title="Masked Autoencoders Are Scalable Vision Learners",
        arxiv="2111.06377",
        bibtex="he2022mae",
        authors="He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Dollár, Piotr and Girshick, Ross",
        teaches="a quarter of the patches predicts the pixels of the rest",
    )
    default_backbone = "vit-base"
    lr_scaling = ("linear", 256)
    masked_views = ("pixel_values",)
    xavier = True
    can_collapse = False  # pixels are the target; a low rank of the class token is no sign of anything
    default_arguments: ClassVar = {
        "optim": "adamw_torch_fused", "base_learning_rate": 1.5e-4, "weight_decay": 0.05, "adam_beta2": 0.95,
        "warmup_steps": 0.05, "max_grad_norm": 0.0, "per_device_train_batch_size": 64, "num_train_epochs": 400,
    }  # fmt: skip

    def add_parts(self, config: MAEConfig) -> None:
        backbones.make_maskable(self.backbone)
        self.patch = backbones.patch_size(self.backbone.config)
        height, width = backbones.image_size(self.backbone.config)
        self.grid = (height // self.patch, width // self.patch)
        decoder = ViTConfig(
            hidden_size=config.decoder_hidden_size,
            num_hidden_layers=config.decoder_num_layers,
            num_attention_heads=config.decoder_num_heads,
            intermediate_size=config.decoder_intermediate_size,
            layer_norm_eps=getattr(self.backbone.config, "layer_norm_eps", 1e-6),
        )
        decoder._attn_implementation = self.backbone.config._attn_implementation
        width = backbones.feature_dim(self.backbone)
        pixels = self.patch**2 * self.backbone.config.num_channels
        self.decoder = heads.TransformerDecoder(width, pixels, decoder)
        self.decoder_positions = nn.Buffer(torch.zeros(1, 1 + self.grid[0] * self.grid[1], decoder.hidden_size))

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        if self.config.fixed_positions:
            yield self.backbone.embeddings.position_embeddings

    def losses(self, pixel_values: Tensor, noise: Tensor | None = None) -> SSLOutput:
        """pixel_values: (B, 1, C, H, W).

        noise: (B, N) numbers that order the patches, lowest kept, as ``row_inputs`` draws them with the views; from
        torch's own generator if None.
        """
        images = pixel_values.flatten(0, 1)
        keep, restore, mask = self._draw_mask(images, noise)
        latent = backbones.visible_tokens(self.backbone, images, keep)
        removed = restore.argsort(dim=1)[:, keep.shape[1] :]  # the loss knows no other patches
        prediction = self.decoder(self._fill_in(latent, restore, images), 1 + removed)
        patches = masks.patchify(images, self.patch)
        target = patches.gather(1, removed.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        loss = masked_pixel_loss(prediction, target, mask.gather(1, removed), self.config.norm_pix_loss)
        return SSLOutput(loss, latent[:, 0])

    def row_inputs(self) -> Callable[..., dict[str, np.ndarray]]:
        return partial(_draw_noise, patch=self.patch)

    def predict(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> prediction (B, N, p·p·C), mask (B, N), 1 = removed, latent (B, 1 + kept, D), shuffled."""
        keep, restore, mask = self._draw_mask(images, noise)
        latent = backbones.visible_tokens(self.backbone, images, keep)
        return self.decoder(self._fill_in(latent, restore, images))[:, 1:], mask, latent

    def _draw_mask(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What ``masks.random_masking`` says of noise (B, N), or of noise drawn here."""
        patches = (images.shape[-2] // self.patch) * (images.shape[-1] // self.patch)
        if noise is None:
            noise = torch.rand(len(images), patches, device=images.device)
        return masks.random_masking(noise.float(), int(patches * (1 - self.config.mask_ratio)))

    def _fill_in(self, latent: Tensor, restore: Tensor, images: Tensor) -> Tensor:
        """Latent (B, 1 + kept, D) -> the decoder's input (B, 1 + N, hidden): with mask tokens, in order, positions."""
        tokens = self.decoder.embed(latent)
        patches, kept = restore.shape[1], latent.shape[1] - 1
        missing = self.decoder.mask_token.to(tokens.dtype).expand(len(images), patches - kept, -1)
        shuffled = torch.cat([tokens[:, 1:], missing], dim=1)
        ordered = shuffled.gather(1, restore.unsqueeze(-1).expand(-1, -1, shuffled.shape[-1]))
        rows, columns = (side // self.patch for side in images.shape[-2:])
        positions = self.decoder_positions
        if (rows, columns) != self.grid:
            table = backbones.sincos_2d(positions.shape[-1], (rows, columns), prefix=1)
            positions = table[None].to(positions)
        return torch.cat([tokens[:, :1], ordered], dim=1) + positions.to(tokens.dtype)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (what the encoder saw, the rest 0; the prediction pasted into it), both (B, C, H, W)."""
        prediction, mask, _ = self.predict(pixel_values, noise)
        patches = masks.patchify(pixel_values, self.patch)
        if self.config.norm_pix_loss:  # the prediction lacks each patch's own mean and contrast: borrow the true ones
            deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
            prediction = prediction * deviation + patches.mean(-1, keepdim=True)
        removed = mask.unsqueeze(-1)
        size = (self.patch, *pixel_values.shape[-2:])
        seen = masks.unpatchify(patches * (1 - removed), *size)
        return seen, masks.unpatchify(patches * (1 - removed) + prediction * removed, *size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is not self:
            return
        for part in self.backbone.modules():  # Xavier as published: the native .02 is small for a narrow ViT
            heads.init_head(part, xavier=True)
        for name, part in self.named_modules():  # published as one matrix of three times the rows
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                heads.init_fused(part, 3)
        table = backbones.sincos_2d(self.decoder_positions.shape[-1], self.grid, prefix=1)
        _check_positions(table)
        init.copy_(self.decoder_positions, table[None])
        if self.config.fixed_positions:
            positions = self.backbone.embeddings.position_embeddings
            fixed = backbones.sincos_2d(positions.shape[-1], self.grid, prefix=1)
            _check_positions(fixed)
            init.copy_(positions, fixed[None])


def _draw_noise(rng: np.random.Generator, views: dict[str, np.ndarray], patch: int) -> dict[str, np.ndarray]:
    """An order of the patches of one image's view (1, H, W, C): whole numbers, so that none are equal."""
    height, width = views["pixel_values"].shape[1:3]
    return {"noise": rng.permutation((height // patch) * (width // patch)).astype(np.int32)}


def masked_pixel_loss(prediction: Tensor, target: Tensor, mask: Tensor, norm_pix: bool) -> Tensor:
    """Squared error, mean over each patch's values, then over the removed patches of the batch (section 3).

    prediction, target: (B, N, P); mask: (B, N), 1 = removed.
    """
    target = masks.normalise_patches(target.float()) if norm_pix else target.float()
    error = (prediction.float() - target).square().mean(-1)
    return (error * mask).sum() / mask.sum()


def _check_positions(table: Tensor) -> None:
    """Zero or repeated position codes make every masked patch get one prediction (transformers 5's ViTMAE)."""
    patches = table[1:]
    if not bool((patches.abs().sum(1) > 0).all()) or len(patches.unique(dim=0)) != len(patches):
        raise ValueError("MAE's position codes must be non-zero and pairwise distinct")
