"""MoCo: a query finds its key in a queue of a momentum encoder's keys (He et al. 2020, 1911.05722; v2 2003.04297).

Teaches that negatives may outlive their batch where a slow encoder keeps them consistent: 65 536 of them at batch 256.
Version 2, the default, adds a two-layer head, blur and τ .2. Version 1: ``num_layers=1, temperature=.07`` and the view
fields ``hue=.4, jitter_p=1, blur_p=0``. What stands in for shuffled BatchNorm: ``hf_ssl.momentum_contrast``.
Siblings: InfoMin is this with stronger views; SimCLR takes its negatives from the batch; MoCo v3 drops the queue and
adds a predictor; NNCLR keeps a queue to find positives in.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from ...modeling import Paper
from ...momentum_contrast import MomentumContrastConfig, MomentumContrastModel
from ...processing import SSLImageProcessor, presets


@strict
class MoCoConfig(MomentumContrastConfig):
    """num_layers: 2 in v2, 1 in v1. temperature: .2 in v2, .07 in v1. The rest: ``MomentumContrastConfig``."""

    model_type = "ssl_moco"

    num_layers: int = 2
    temperature: float | int = 0.2


class MoCoImageProcessor(SSLImageProcessor):
    """Two random crops: flip, colour jitter, grayscale, blur (v2). Version 1: ``hue=.4, jitter_p=1, blur_p=0``."""

    views = presets.MOCO_V2


class MoCoForPreTraining(MomentumContrastModel):
    """Backbone → MLP head without BatchNorm → InfoNCE against the queue; the query encoder is what is published."""

    config: MoCoConfig
    paper = Paper(
        name="MoCo",
        title="Momentum Contrast for Unsupervised Visual Representation Learning",
        arxiv="1911.05722",
        bibtex="he2020moco",
        family="joint_embedding",
        authors="He, Kaiming and Fan, Haoqi and Wu, Yuxin and Xie, Saining and Girshick, Ross",
        teaches="a view finds its image's key in a queue of older keys",
    )
    processor_class = MoCoImageProcessor
    lr_scaling = ("linear", 256)  # the paper's .03 is for its batch of 256
    default_arguments: ClassVar = {
        "optim": "sgd_momentum", "base_learning_rate": 0.03, "weight_decay": 1e-4, "per_device_train_batch_size": 256,
        "num_train_epochs": 200,
    }  # fmt: skip

    def __init__(self, config: MoCoConfig):
        super().__init__(config)
        self.post_init()
