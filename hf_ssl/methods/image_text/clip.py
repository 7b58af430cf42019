"""CLIP: an image and its text agree, the other texts and images of the batch are negatives (Radford et al. 2021).

Teaches that captions are labels without classes: what is learned answers any prompt (2103.00020). Siblings: SigLIP
replaces the softmax by a sigmoid per pair; LiT locks a pretrained image tower; SLIP adds SimCLR on the images.
transformers owns the names CLIPConfig and CLIPImageProcessor, hence ``SSLCLIP``.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, CLIPConfig, PreTrainedConfig, PreTrainedModel, VisionTextDualEncoderConfig
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec

from ... import backbones, distributed
from ...backbones import two_towers
from ...losses import choice_loss
from ...modeling import Paper, SSLConfig, SSLModel, SSLOutput
from ...processing.image_text import ImageTextProcessor

MAX_LOGIT_SCALE = math.log(100.0)


@strict
class SSLCLIPConfig(SSLConfig):
    """backbone_config: CLIPConfig, or VisionTextDualEncoderConfig for other towers (``two_towers.image_text_config``).
    Widths of the towers and of the joint space are the native config's.
    micro_batch_size: pairs whose activations a tower holds at a time (None: all); loss and gradient stay the same."""

    model_type = "ssl_clip"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(AutoConfig, model_type="clip")}

    micro_batch_size: int | None = None

    def __post_init__(self, **kwargs):
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(
                f"micro_batch_size must be at least 1, or None for the whole batch, not {self.micro_batch_size}"
            )
        super().__post_init__(**kwargs)


class SSLCLIPImageProcessor(ImageTextProcessor):
    """One random crop, nothing else (section 2.3): colour and left-right are part of what captions say.

    The paper crops a random square of the resized picture; 90–100 % of the area is open_clip's form of it.
    """

    views: ClassVar = [{"key": "pixel_values", "count": 1, "scale": [0.9, 1.0], "interpolation": "bicubic"}]


class SSLCLIPForPreTraining(SSLModel):
    """Two native towers, their projections and one learned temperature; the negatives are the global batch."""

    config: SSLCLIPConfig
    processor_class = SSLCLIPImageProcessor
    input_modalities = ("image", "text")
    reads = "texts"
    publishes = "two_towers"
    paper = Paper(
        name="CLIP",
        title="Learning Transferable Visual Models From Natural Language Supervision",
        arxiv="2103.00020",
        bibtex="radford2021clip",
        authors=(
            "Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel"
            " and Agarwal, Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela"
            " and Clark, Jack and Krueger, Gretchen and Sutskever, Ilya"
        ),
        teaches="an image and its caption attract, all other pairs of the batch repel",
    )
    lr_scaling = ("none", 32768)
    compares_images = "without others there are no negatives"
    default_backbone = "vit-base"
    can_collapse = False  # one vector for all images is a loss of ln B; healthy image vectors fill a narrow cone only
    default_arguments: ClassVar = {
        "optim": "adamw_torch_fused", "base_learning_rate": 5e-4, "weight_decay": 0.2, "adam_beta2": 0.98,
        "adam_epsilon": 1e-6, "warmup_steps": 0.1, "per_device_train_batch_size": 256, "num_train_epochs": 32,
    }  # fmt: skip

    def build_backbone(self, config: PreTrainedConfig) -> PreTrainedModel:
        if isinstance(config, VisionTextDualEncoderConfig):
            two_towers.check_towers(config)
        elif not isinstance(config, CLIPConfig):
            raise ValueError(
                f"CLIP needs a native config with an image and a text tower, not {type(config).__name__}: "
                "hf_ssl.backbones.two_towers.image_text_config makes one"
            )
        return backbones.build(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:  # transformers leaves it to the constructor, which from_pretrained runs without memory
            init.constant_(self.backbone.logit_scale, self.backbone.config.logit_scale_init_value)

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's table of tokens: the one input that is looked up."""
        return self.backbone.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.text_model.set_input_embeddings(value)

    def update_state(self) -> None:
        self.backbone.logit_scale.clamp_(max=MAX_LOGIT_SCALE)  # section 2.5: never more than a factor of 100

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) token ids -> (B, D) in the joint space, not normalised."""
        return self.backbone.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output

    def losses(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> SSLOutput:
        """pixel_values: (B, 1, C, H, W) or (B, C, H, W); input_ids and attention_mask: (B, L), a text each."""
        pixel_values, input_ids = _pairs(pixel_values, input_ids)
        images = self._in_chunks(self.features, pixel_values)
        texts = self._in_chunks(self.text_features, input_ids, attention_mask)
        scale = self.backbone.logit_scale.exp()
        local_images, local_texts = (F.normalize(side.float(), dim=-1) for side in (images, texts))
        all_images, all_texts = (distributed.gather_with_grad(side) for side in (local_images, local_texts))
        to_texts, to_images = clip_logits(local_images, local_texts, all_images, all_texts, scale)
        loss, metrics = clip_loss(to_texts, to_images, offset=distributed.rank() * len(images))
        return SSLOutput(loss, images.detach(), {"logit_scale": scale.detach(), **metrics})

    def _in_chunks(self, tower: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        """``tower(*tensors)``, holding the activations of ``micro_batch_size`` rows at a time.

        Why it is exact: the loss needs all embeddings at once but a tower only its own rows. Each chunk keeps its
        inputs and output (B, D); backward hands it the whole batch's gradient of its rows, reruns it with the
        same random numbers and autocast state, and adds to the parameters. This is GradCache in one graph: there is
        one backward pass, so DDP sees each parameter once, the gather above runs once, and a tower's own gradient
        checkpointing nests inside.
        """
        size, rows = self.config.micro_batch_size, len(tensors[0])  # type: ignore[arg-type]
        if size is None or size >= rows or not torch.is_grad_enabled():
            return tower(*tensors)
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in self.backbone.modules()):
            raise ValueError(
                "micro_batch_size with a BatchNorm tower: a chunk's statistics are not the batch's, loss and gradient "
                "would change. Leave micro_batch_size out, or take towers with LayerNorm (CLIP's, ViT, ConvNeXt)"
            )
        starts = range(0, rows, size)
        chunks = ([None if t is None else t[start : start + size] for t in tensors] for start in starts)
        return torch.cat([_checkpointed(tower, *chunk) for chunk in chunks])


def _checkpointed(tower: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    output: Any = checkpoint(tower, *tensors, use_reentrant=False)
    return output


def _pairs(pixel_values: Tensor, input_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Images without their view axis and their texts; ValueError if there is not one text for each image."""
    if pixel_values.ndim == 5:
        if pixel_values.shape[1] != 1:
            raise ValueError(f"CLIP trains on 1 view per image, got {pixel_values.shape[1]}")
        pixel_values = pixel_values[:, 0]
    if input_ids is None:
        raise ValueError("CLIP trains on pairs: give input_ids, or (B, C, H, W) images to embed them")
    if len(input_ids) != len(pixel_values):
        raise ValueError(f"CLIP needs one text per image, got {len(pixel_values)} images and {len(input_ids)} texts")
    return pixel_values, input_ids


def clip_logits(
    images: Tensor, texts: Tensor, all_images: Tensor, all_texts: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Scaled similarities of local images to all texts, and of local texts to all images: two (B, W·B), float32.

    images, texts: (B, D) unit vectors of this rank. all_images, all_texts: (W·B, D), all ranks', in rank order.
    """
    with torch.autocast(images.device.type, enabled=False):  # times up to 100: bfloat16 would round whole logits
        return scale * images.float() @ all_texts.float().T, scale * texts.float() @ all_images.float().T


def clip_loss(to_texts: Tensor, to_images: Tensor, offset: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """½ (image→text + text→image cross-entropy), mean over the local rows; the partner of row i is column offset + i.

    Local rows and a gather that carries gradient: DDP's mean over ranks is the single-process gradient, the logit
    scale's too. Also the shares of rows whose partner ranks first.
    """
    partner = torch.arange(len(to_texts), device=to_texts.device) + offset
    (first, text_hits), (second, image_hits) = (choice_loss(logits, partner) for logits in (to_texts, to_images))
    return (first + second) / 2, {"image_to_text_accuracy": text_hits, "text_to_image_accuracy": image_hits}
