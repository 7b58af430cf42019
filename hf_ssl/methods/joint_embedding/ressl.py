"""ReSSL: a strong view relates to a queue of images as the teacher's weak view does (Zheng et al. 2021, 2107.09282).

Teaches that how alike two images are is worth keeping, where contrastive methods push all others away alike; and that
a teacher should see its image unspoilt. Details are those of the authors' code (mingkai-zheng/ReSSL at 277ab05).
Siblings: MoCo is the same two encoders and queue with the own key as the one right answer; DINO's distributions are
over learnt prototypes instead of images; NNCLR takes its positive from a queue. The teacher's BatchNorm follows the
student's statistics in place of the authors' shuffling: ``moco``.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor

from ...losses import hit_rate, similarities
from ...modeling import Paper
from ...processing import SSLImageProcessor, presets
from .moco import MoCoConfig, MoCoForPreTraining


@strict
class ReSSLConfig(MoCoConfig):
    """temperature: the student's. teacher_temperature: lower, so that the target is the sharper one (0.04 to 0.05).
    queue_size, teacher_momentum, projection_dim, hidden_dim, num_layers: ``MoCoConfig``."""

    model_type = "ssl_ressl"

    projection_dim: int = 512
    hidden_dim: int | None = 4096
    queue_size: int = 131072
    temperature: float | int = 0.1
    teacher_temperature: float | int = 0.04


class ReSSLImageProcessor(SSLImageProcessor):
    """The student's crop coloured and blurred as in MoCo v2, then the teacher's: cropped and mirrored, no more."""

    views: ClassVar = [
        {**presets.MOCO_V2_VIEW, "count": 1},
        {
            "key": "pixel_values", "count": 1, "scale": [0.2, 1.0], "interpolation": "bilinear", "hflip": 0.5,
            "jitter_p": 0.0,  # so that colours set for all views stay the student's
        },
    ]  # fmt: skip


class ReSSLForPreTraining(MoCoForPreTraining):
    """Backbone → MLP head without BatchNorm → cross-entropy between two softmaxes over the queue; one direction."""

    config: ReSSLConfig
    paper = Paper(
        name="ReSSL",
        title="ReSSL: Relational Self-Supervised Learning with Weak Augmentation",
        arxiv="2107.09282",
        bibtex="zheng2021ressl",
        authors=(
            "Zheng, Mingkai and You, Shan and Wang, Fei and Qian, Chen and Zhang, Changshui and Wang, Xiaogang"
            " and Xu, Chang"
        ),
        teaches="a strong view is as similar to older images as the teacher's weak view is",
    )
    processor_class = ReSSLImageProcessor
    lr_scaling = ("linear", 256)
    default_arguments: ClassVar = {
        "optim": "sgd_momentum", "momentum": 0.9, "base_learning_rate": 0.05, "weight_decay": 1e-4,
        "warmup_steps": 0.025, "per_device_train_batch_size": 256, "num_train_epochs": 200,
    }  # fmt: skip

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        queries = F.normalize(self.projector(embeddings).float(), dim=1)
        return self.relate(queries, self.keys(pixel_values[:, 1:]))

    def relate(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Student's queries and teacher's keys (B, d), unit vectors: cross-entropy of their relations to the queue
        (eq. 5), mean over the batch; entropy of the teacher's, in nats, and how often both rank one image first."""
        images, c = self.queue.rows, self.config
        found = similarities(queries, images, c.temperature).log_softmax(1)
        wanted = similarities(keys, images, c.teacher_temperature).softmax(1)
        agreement = hit_rate(found, wanted.argmax(1))
        entropy = torch.special.entr(wanted).sum(1).mean()
        return -(wanted * found).sum(1).mean(), {"relation_entropy": entropy, "relation_agreement": agreement}
