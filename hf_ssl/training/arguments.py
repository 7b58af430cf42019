"""What a run is told: the data, the model and the training arguments. The CLI's flags are these fields."""

from dataclasses import dataclass, field

import torch
from transformers import SchedulerType, TrainingArguments


@dataclass
class DataArguments:
    """Where images come from. A spec: emoji, emoji:placed, fashion-mnist, a folder, *.parquet, *.tar or a Hub id."""

    dataset: str = field(default="emoji", metadata={"help": "Images to train on (labels are never used)."})
    split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Labelled images for the online kNN and the final table; default: the same."}
    )
    eval_split: str = field(default="test", metadata={"help": "Split that the final table queries."})
    image_column: str | None = field(default=None, metadata={"help": "Column with the image; found if not given."})
    label_column: str | None = field(default=None, metadata={"help": "Column with the label; found if not given."})
    streaming: bool = field(default=False, metadata={"help": "Read as a stream instead of indexing the whole set."})
    shuffle_buffer: int = field(default=4096, metadata={"help": "Undecoded rows that a stream shuffles among."})


@dataclass
class ModelArguments:
    """What is trained. Every field of the method's config and every view field is a flag of its own as well."""

    backbone: str | None = field(
        default=None,
        metadata={"help": "Preset (resnet-nano, vit-nano, ...), folder or Hub id of a native model to start from."},
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the (large) training views in pixels."})
    patch_size: int | None = field(default=None, metadata={"help": "Side of a ViT's patches in pixels."})
    num_channels: int | None = field(default=None, metadata={"help": "1, 3, 4, 13, ...; default: the dataset's."})


@dataclass
class SSLTrainingArguments(TrainingArguments):
    """``TrainingArguments`` plus what self-supervision needs; defaults that differ are set in ``__post_init__``.

    base_learning_rate scales with the global batch by the method's rule (``SSLModel.lr_scaling``); learning_rate is
    taken as it is. ``optim="lars"`` is LARS with the published trust ratio.
    """

    lr_scheduler_type: SchedulerType | str = field(
        default="cosine_with_min_lr", metadata={"help": "Learning-rate schedule; default: warm-up, then a cosine."}
    )
    base_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate before the method's batch-size scaling (e.g. × batch / 256)."}
    )
    min_learning_rate: float = field(default=0.0, metadata={"help": "Where the cosine ends."})
    weight_decay_end: float | None = field(
        default=None, metadata={"help": "Weight decay follows a cosine from weight_decay to this value."}
    )
    clip_grad_per_tensor: float = field(
        default=0.0, metadata={"help": "Clip each parameter's gradient norm on its own (DINO: 3.0); 0 = off."}
    )
    precision: str = field(
        default="auto", metadata={"help": "auto (bf16 where the hardware is faster with it), fp32, bf16 or fp16."}
    )
    sync_batchnorm: bool = field(default=True, metadata={"help": "BatchNorm over the global batch of all ranks."})
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Stop, checkpoint saved, when more images than this share cannot be read."}
    )
    health_steps: int = field(default=50, metadata={"help": "Check for collapse every so many steps; 0 = never."})
    knn_images: int = field(default=2000, metadata={"help": "At most so many images in the online kNN's bank."})

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"precision must be auto, fp32, bf16 or fp16, not {self.precision!r}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is a share between 0 and 1, not {self.max_bad_fraction}")
        if self.base_learning_rate is not None and self.base_learning_rate <= 0:
            raise ValueError(f"base_learning_rate must be positive, not {self.base_learning_rate}")
        self.use_lars = str(self.optim).lower() == "lars"
        if self.use_lars:
            self.optim = "sgd"  # the name Trainer knows; SSLTrainer.create_optimizer builds LARS
        # Views carry their own column names, and a stream must not be read by rank 0 alone.
        self.remove_unused_columns = False
        # Rank 0's centre and queue sums must not overwrite the others' between micro-batches.
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr": self.min_learning_rate}
        self._resolve_precision()
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # Trainer wants it said before it trains in bf16 on a CPU
        super().__post_init__()

    def _resolve_precision(self) -> None:
        if self.precision == "auto":
            fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            self.bf16 = self.bf16 or (fast and not self.fp16)
        else:
            self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
