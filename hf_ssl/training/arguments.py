"""The settings of a run: the data, the model and the training arguments. The CLI's flags are these fields."""

from dataclasses import dataclass, field

import torch
from transformers import IntervalStrategy, SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .. import limits, schedules

# What optim and lr_scheduler_type may name beside transformers' own; SSLTrainer builds them.
OPTIMISERS = ("lars", "sgd_momentum", "sgd_nesterov")
SCHEDULES = ("cosine_7_16", "cosine_with_min_lr")  # shapes of ``schedules.LEARNING_RATES``


@dataclass
class DataArguments:
    """Where images come from: emoji, emoji:placed, fashion-mnist, a folder, *.png, *.parquet, *.tar or a Hub id."""

    dataset: str = field(
        default="", metadata={"help": "Images to train on: a folder, shards, a Hub id or built-in drawings (emoji)."}
    )
    split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Labelled images for the online kNN and the final table; default: the same."}
    )
    eval_split: str = field(
        default="test",
        metadata={
            "help": "Split to test on; where there is none, a fixed fifth of the images is kept out of training."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Column with the image; found if not given."})
    label_column: str | None = field(default=None, metadata={"help": "Column with the label; found if not given."})
    allow_outside_files: bool = field(
        default=False, metadata={"help": "Let rows name files outside of their data set, and web addresses."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on while training and to choose a checkpoint; default: eval_split."},
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={"help": "Instead of a split: this share of the training images, kept out of training."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read as a stream instead of indexing the whole set."})
    shuffle_buffer: int = field(default=4096, metadata={"help": "Undecoded rows that a stream shuffles among."})
    limits = {"validation_fraction": "(0, 1)", "shuffle_buffer": "[1, inf)"}

    def __post_init__(self) -> None:
        limits.check(self)


@dataclass
class ModelArguments:
    """What is trained. Every field of the method's config and every view field is a flag of its own as well."""

    backbone: str | None = field(
        default=None,
        metadata={"help": "Preset (resnet-nano, vit-nano, ...), folder or Hub id of a native model to start from."},
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the (large) training views in pixels."})
    patch_size: int | None = field(default=None, metadata={"help": "Side of a ViT's patches in pixels."})
    num_channels: int | None = field(
        default=None, metadata={"help": "Channels: 1, 3, 4, 13, ...; default: the dataset's."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention: sdpa, eager, flash_attention_2, ...; eager is faster for bf16 on some CPUs."},
    )
    limits = {"image_size": "[1, 16384]", "patch_size": "[1, 16384]", "num_channels": "[1, 4096]"}

    def __post_init__(self) -> None:
        limits.check(self)


@dataclass
class SSLTrainingArguments(TrainingArguments):
    """``TrainingArguments`` plus what self-supervision needs; defaults that differ are set in ``__post_init__``.

    base_learning_rate scales with the global batch by the method's rule (``SSLModel.lr_scaling``); learning_rate is
    taken as it is. ``optim="lars"`` is LARS with the published trust ratio, ``"sgd_momentum"`` SGD with momentum,
    ``"sgd_nesterov"`` with Nesterov's; ``lr_scheduler_type="cosine_7_16"`` is FixMatch's cosine. ``precision="auto"``
    is bf16 on a GPU that has it; on such a CPU, runs of 100 steps and more take what suits the processor and the model
    unless one measurement, remembered per machine and shape, is clearly against it. run.json says which and why.
    """

    lr_scheduler_type: SchedulerType | str = field(
        default="cosine_with_min_lr", metadata={"help": "Learning-rate schedule; default: warm-up, then a cosine."}
    )
    base_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate before the method's batch-size scaling (e.g. × batch / 256)."}
    )
    min_learning_rate: float = field(default=0.0, metadata={"help": "Where the cosine ends."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of sgd_momentum, sgd_nesterov and lars."})
    weight_decay_end: float | None = field(
        default=None, metadata={"help": "Weight decay follows a cosine from weight_decay to this value."}
    )
    clip_grad_per_tensor: float = field(
        default=0.0, metadata={"help": "Clip each parameter's gradient norm on its own (DINO: 3.0); 0 = off."}
    )
    clip_grad_per_module: float = field(
        default=0.0, metadata={"help": "Clip the backbone's and each head's gradient norm (DINOv2: 3.0); 0 = off."}
    )
    precision: str = field(
        default="auto",
        metadata={"help": "Precision: auto (bf16 where the machine is faster with it), fp32, bf16 or fp16."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide nan and inf losses from the log; looking waits for the device."}
    )
    sync_batchnorm: bool = field(default=True, metadata={"help": "BatchNorm over the global batch of all ranks."})
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Stop, checkpoint saved, when more images than this share cannot be read."}
    )
    nonfinite_steps: int = field(
        default=3, metadata={"help": "Stop after so many steps in a row whose loss or gradient is NaN or infinite."}
    )
    health_steps: int = field(default=50, metadata={"help": "Check for collapse every so many steps; 0 = never."})
    eval_images: int = field(
        default=2000, metadata={"help": "At most so many images of a split in evaluations while training; 0 = all."}
    )
    limits = {
        "max_steps": "-1 or [1, inf)", "num_train_epochs": "(0, inf)", "per_device_train_batch_size": "[1, inf)",
        "per_device_eval_batch_size": "[1, inf)", "gradient_accumulation_steps": "[1, inf)",
        "eval_accumulation_steps": "[1, inf)", "logging_steps": "(0, inf)", "save_steps": "(0, inf)",
        "eval_steps": "(0, inf)", "save_total_limit": "[1, inf)", "base_learning_rate": "(0, inf)",
        "adam_beta1": "[0, 1)", "adam_beta2": "[0, 1)", "momentum": "[0, 1]", "label_smoothing_factor": "[0, 1]",
        "max_bad_fraction": "[0, 1]", "nonfinite_steps": "[1, inf)", "seed": "[0, 4294967295]",
        "data_seed": "[0, 4294967295]",
        "dataloader_num_workers": "[0, 1024]", "dataloader_prefetch_factor": "[1, inf)", "local_rank": "[-1, inf)",
    }  # fmt: skip

    save_steps: float | None = field(
        default=None,
        metadata={"help": "Save every so many steps, or below 1 every such share of them; default: save_minutes."},
    )
    save_minutes: float = field(
        default=5.0, metadata={"help": "Without save_steps: save every so many minutes, and at the end."}
    )
    allow_changed: str | list[str] | None = field(
        default=None,
        metadata={"help": "Settings that may differ from the checkpoint's in a resumed run: learning_rate,seed."},
    )

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"precision must be auto, fp32, bf16 or fp16, not {self.precision!r}")
        limits.check(self)
        name, shape = (str(getattr(value, "value", value)).lower() for value in (self.optim, self.lr_scheduler_type))
        self.asked = {"optim": name, "lr_scheduler_type": shape}  # both are renamed below
        self.own_optimiser = name if name in OPTIMISERS else None
        if self.own_optimiser:
            self.optim = "sgd"  # a name Trainer knows; SSLTrainer.create_optimizer builds the one that was asked for
        self.own_schedule = schedules.LEARNING_RATES.get(shape)
        if self.own_schedule:
            self.lr_scheduler_type = "cosine"  # likewise
        # Views carry their own column names, and a stream must not be read by rank 0 alone.
        self.remove_unused_columns = False
        # Rank 0's centre and queue sums must not overwrite the others' between micro-batches.
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False
        self._resolve_saving()
        self._resolve_precision()
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # Trainer wants it said before it trains in bf16 on a CPU
        super().__post_init__()

    def _resolve_saving(self) -> None:
        """By the clock unless save_steps is given; the best checkpoint needs a save at each evaluation."""
        self.saves_by_time = SaveStrategy(self.save_strategy) == SaveStrategy.STEPS and not self.save_steps
        if self.saves_by_time:
            evaluates = self.load_best_model_at_end and IntervalStrategy(self.eval_strategy) == IntervalStrategy.STEPS
            self.save_steps = (self.eval_steps or self.logging_steps) if evaluates else 0  # 0: never by their number
        elif self.save_steps is None:
            self.save_steps = 500  # Trainer's own, which its other strategies do not look at

    @property
    def allowed_changes(self) -> tuple[str, ...]:
        """The names in ``allow_changed``, which is a list or text with commas."""
        given = self.allow_changed or ()
        names = given.split(",") if isinstance(given, str) else given
        return tuple(name.strip().replace("-", "_") for name in names if name.strip())

    def _resolve_precision(self) -> None:
        if self.precision == "auto":
            fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            self.bf16 = self.bf16 or (fast and not self.fp16)
        else:
            self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        if self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            raise ValueError("fp16 needs a GPU: on a CPU take precision bf16 or fp32")
