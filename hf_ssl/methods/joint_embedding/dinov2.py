"""DINOv2: DINO on crops, iBOT on masked patches, features pushed apart (Oquab et al. 2023, 2304.07193).

Teaches features that need no fine-tuning: the class token for images, the patch tokens for segmentation and depth.
The published ImageNet-1k recipe (one head, softmax centring) is the default. That for 142 million images is
``separate_heads, out_dim=patch_out_dim=131072, bottleneck_dim=384, centering="sinkhorn", layer_decay=1``.
Siblings: DINO has the first of the three losses, iBOT the first two; DINOv3 adds Gram anchoring and rotary positions.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from ...modeling import Paper
from ...patch_distillation import PatchDistillationConfig, PatchDistillationModel
from ...processing import SSLImageProcessor, presets


@strict
class SSLDINOv2Config(PatchDistillationConfig):
    """As PatchDistillationConfig, whose defaults are the ImageNet-1k recipe's (``vitl16_short``)."""

    model_type = "ssl_dinov2"

    out_dim: int = 65536


class SSLDINOv2ImageProcessor(SSLImageProcessor):
    """Two large crops (blur always / rarely with solarisation) and eight small ones, as DINO at other scales."""

    views = presets.DINOV2


class SSLDINOv2ForPreTraining(PatchDistillationModel):
    """``PatchDistillationModel`` with weight-normalised prototypes, whose gain trains."""

    config: SSLDINOv2Config
    paper = Paper(
        name="DINOv2",
        title="DINOv2: Learning Robust Visual Features without Supervision",
        arxiv="2304.07193",
        bibtex="oquab2023dinov2",
        family="joint_embedding",
        authors=(
            "Oquab, Maxime and Darcet, Timothée and Moutakanni, Théo and Vo, Huy and Szafraniec, Marc"
            " and Khalidov, Vasil and others"
        ),
        teaches="masked and small crops predict what an EMA teacher says of whole ones and of their patches",
    )
    processor_class = SSLDINOv2ImageProcessor
    default_backbone = "dinov2-small"
    lr_scaling = ("sqrt", 1024)
    default_arguments: ClassVar = {
        "optim": "adamw_torch_fused", "base_learning_rate": 4e-3, "min_learning_rate": 1e-6, "weight_decay": 0.04,
        "weight_decay_end": 0.4, "warmup_steps": 0.1, "max_grad_norm": 0.0, "clip_grad_per_module": 3.0,
        "per_device_train_batch_size": 64, "num_train_epochs": 100,
    }  # fmt: skip

    def __init__(self, config: SSLDINOv2Config):
        super().__init__(config)
        self.post_init()
