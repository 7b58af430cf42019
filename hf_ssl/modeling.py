"""The contract that every method keeps: ``SSLConfig``, ``SSLModel``, ``SSLOutput``.

A method composes a native transformers backbone with its heads, teacher and buffers; ``forward`` takes named tensors
and returns an ``SSLOutput``. Everything that a next training step depends on is a parameter or a persistent buffer.
"""

import importlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from . import backbones, distributed, heads, limits, memory, momentum, schedules
from .processing import SSLImageProcessor
from .processing.published import method_folder
from .spelling import hint

# Arguments of every config that no attribute of PreTrainedConfig shows.
_ARGUMENTS = (
    "attn_implementation", "experts_implementation", "auto_map", "quantization_config", "custom_pipelines",
    "use_cache",  # Trainer writes it into the config of every model
)  # fmt: skip
# Arguments of ``from_pretrained`` that say where from and how, not what.
_LOADING = (
    "cache_dir", "force_download", "local_files_only", "token", "revision", "code_revision", "subfolder", "proxies",
    "trust_remote_code", "resume_download", "use_auth_token", "user_agent",
)  # fmt: skip

logger = logging.getLogger("hf_ssl")


@strict
class SSLConfig(PreTrainedConfig):
    """Base of every method's config.

    backbone_config: the native backbone's config: an instance, a dict with ``model_type``, or None for a ViT-B/16.
    A class states in ``limits`` what its numbers may be; ValueError where one is not (see ``hf_ssl.limits``).
    """

    model_type = "ssl"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(AutoConfig, model_type="vit")}

    backbone_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if unknown := [name for name in kwargs if not _is_of_transformers(name)]:
            raise ValueError(self.no_field(unknown[0]))
        limits.check(self)
        super().__post_init__(**kwargs)

    @classmethod
    def no_field(cls, name: str) -> str:
        """The sentence on a field that the config does not have, with the nearest of its own."""
        own = [field.name for field in fields(cls) if not _is_of_transformers(field.name)]
        return f"{cls.__name__} has no field {name!r}{hint(name, own)}."

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers. What another version saved and this one has no field for stays an attribute.

        ValueError where a keyword, such as a misspelt one of ``from_pretrained``, is none that changes anything.
        """
        known = {field.name for field in fields(cls)}
        others = {k: v for k, v in config_dict.items() if k not in known and not _is_of_transformers(k)}
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        loaded, unused = super().from_dict(
            {k: v for k, v in config_dict.items() if k not in others}, return_unused_kwargs=True, **kwargs
        )
        unknown = [name for name in unused if name not in _LOADING and not _is_of_transformers(name)]
        if unknown and not wants_unused:
            raise ValueError(cls.no_field(unknown[0]))
        if others:
            names = ", ".join(others)
            logger.warning("%s has no field %s, which its file holds: another version wrote it.", cls.__name__, names)
        for name, value in others.items():
            setattr(loaded, name, value)
        return (loaded, unused) if wants_unused else loaded

    def to_diff_dict(self) -> dict[str, Any]:
        return _without_folders(super().to_diff_dict())  # what is saved is published


def _is_of_transformers(name: str) -> bool:
    """Whether every config of transformers may be given that argument: id2label, dtype, attn_implementation, ..."""
    own = getattr(PreTrainedConfig, name, None)
    return name.startswith("_") or name in _ARGUMENTS or (hasattr(PreTrainedConfig, name) and not callable(own))


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """Of a folder that a part was loaded from only the name; a Hub id stays."""
    origin = config.get("_name_or_path")
    if isinstance(origin, str) and (Path(origin).is_absolute() or Path(origin).expanduser().exists()):
        config = {**config, "_name_or_path": Path(origin).name}
    return {key: _without_folders(value) if isinstance(value, dict) else value for key, value in config.items()}


@dataclass
class SSLOutput(ModelOutput):
    """loss: mean over the local batch (None without training views). embeddings: (B or V·B, D) backbone features.
    metrics: detached scalars or vectors (histograms), averaged over micro-batches and ranks and logged by the trainer.
    hidden_states, attentions: the exported model's, where they were asked for and one view was embedded; a training
    batch, whose passes have several views and sizes, gives none.
    """

    loss: Tensor | None = None
    embeddings: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def with_master_weights(options: dict[str, Any]) -> dict[str, Any]:
    """``from_pretrained``'s options, in place: float32 where no dtype is given, not transformers' "auto"."""
    if options.get("dtype") is None and options.get("torch_dtype") is None:
        options["dtype"] = torch.float32
    return options


@dataclass(frozen=True)
class Paper:
    """What a method states about itself; the card, the CLI and ``hf-ssl methods`` read it."""

    name: str
    title: str
    arxiv: str
    bibtex: str
    teaches: str
    authors: str = ""  # as BibTeX wants them: Last, First and Last, First


class SSLModel(PreTrainedModel):
    """Base of every method: a native ``backbone`` plus what the method adds.

    ``from_pretrained(<any native repo>, config=...)`` warm-starts the backbone; a repo of ours restores everything.
    Either way the weights are float32, in which small steps add up, unless ``dtype`` asks for another precision.
    Subclasses set ``paper``, ``lr_scaling`` (how the published learning rate scales with the global batch) and
    ``default_arguments`` (the paper's optimiser as training-argument fields), and may override the three hooks below.
    """

    config: SSLConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_ndim: ClassVar[int] = 4  # of what is embedded, (B, C, H, W); a training batch has an axis of views as well
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    accepts_loss_kwargs = False  # the loss is a per-batch mean: Trainer divides it by the accumulation steps

    paper: ClassVar[Paper]
    reads: ClassVar[str] = "images"  # what its training data hold: "images", "labels" (of some of them) or "texts"
    publishes: ClassVar[str] = "backbone"  # the native model in a repo's root: or "classifier", or "two_towers"
    processor_class: ClassVar[type[SSLImageProcessor]]
    lr_scaling: ClassVar[tuple[str, int]] = ("linear", 256)  # lr = base · batch/256; "sqrt" and "none" exist
    default_arguments: ClassVar[dict[str, Any]] = {}
    default_backbone: ClassVar[str] = "resnet-50"  # a preset of ``backbones.PRESETS``
    can_collapse: ClassVar[bool] = True  # whether one answer for all images could satisfy the loss
    masked_views: ClassVar[tuple[str, ...]] = ()  # keys of the views whose patches are dropped: they must be whole
    compares_images: ClassVar[str | None] = None  # why one image in the global batch is none to learn from, in words
    # True: ``losses`` takes ``index`` (B,), the images' row numbers; where there are labels, ``unlabeled_index``
    needs_index: ClassVar[bool] = False
    host_inputs: ClassVar[tuple[str, ...]] = ()  # what ``forward`` reads on the host: NumPy arrays in training
    xavier: ClassVar[bool] = False  # whether the heads' linear layers start Xavier-uniform, not truncated normal
    start_left: ClassVar[float] = 0.05  # share of a random start above which ``average`` is not published
    followed: tuple[str, ...] = ()  # the parts that an EMA teacher copies: see ``add_teacher``
    teacher_buffers: bool = False  # True: EMA of BatchNorm's statistics as well (a teacher that never runs)
    validated: tuple[str, str] | None = None  # which weights are better on validation images, and in words
    attention_given: bool = False  # whether somebody chose the attention implementation
    processor: SSLImageProcessor | None = None  # the one it is trained with, where known; ``push_to_hub`` uses it
    backbone: Any  # a native PreTrainedModel
    teacher_backbone: Any  # its EMA, where ``followed`` names the backbone
    step: Tensor
    total_steps: Tensor

    def __init__(self, config: SSLConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        assert isinstance(config.backbone_config, PreTrainedConfig)  # the config class made it one
        self.backbone = self.build_backbone(config.backbone_config) if backbone is None else backbone
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total_steps", torch.ones((), dtype=torch.int64))
        self.add_parts(config)
        self.post_init()

    def post_init(self) -> None:
        super().post_init()
        self.train(self.training)  # a model that was never told its mode has a frozen teacher as well

    # --- what a method may override -------------------------------------------------------------------------------

    def build_backbone(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The native model of ``config`` that the method trains, with random weights."""
        return backbones.build(config)

    def add_parts(self, config: Any) -> None:
        """Adds to the backbone what else the method trains and remembers: heads, ``add_teacher``, memories.

        A method that extends another calls ``super().add_parts(config)`` first. Initial values: ``_init_weights``.
        """

    def losses(self, pixel_values: Tensor, **views: Any) -> SSLOutput:
        """The training step: what ``forward`` returns of a batch of views; see the subclass for what it takes."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it learns from a batch: losses()")

    def embed(self, pixel_values: Tensor, **wanted: bool) -> SSLOutput:
        """What ``forward`` returns of one view. wanted: output_hidden_states, output_attentions."""
        if not wanted:
            return SSLOutput(embeddings=self.features(pixel_values))
        embeddings, outputs = backbones.features_and_outputs(self.export_backbone, pixel_values, **wanted)
        return SSLOutput(None, embeddings, None, outputs.get("hidden_states"), outputs.get("attentions"))

    def fewest_images(self) -> tuple[int, str]:
        """How many images the batch of all ranks together must have for the loss to mean anything, and why."""
        return (2, self.compares_images) if self.compares_images else (1, "")

    def images_in(self, pixel_values: Tensor, **views: Any) -> int:
        """How many images a training batch has, as ``check_batch`` counts them."""
        return len(pixel_values)

    def batch_statistics(self) -> Iterator[nn.Module]:
        """The BatchNorm layers that normalise a training batch's images by one another."""
        return (m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training)

    def teachers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(student, teacher) pairs: each teacher follows its student by EMA. Those of ``followed``."""
        pairs = ((getattr(self, part), getattr(self, f"teacher_{part}", None)) for part in self.followed)
        yield from ((student, teacher) for student, teacher in pairs if teacher is not None)

    def teacher_momentum(self, progress: float) -> float:
        """EMA momentum at ``progress`` in [0, 1] of the run: the config's, risen to 1 along half a cosine."""
        start = getattr(self.config, "teacher_momentum", None)
        if start is None:
            raise ValueError(f"{type(self).__name__} names teachers but no teacher_momentum")
        return schedules.cosine(progress, start, 1.0)

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        """Student-side parameters that are never trained (fixed positions, a frozen weight-norm gain)."""
        yield from ()

    def constant_rate_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that the learning-rate schedule leaves alone (SimSiam's predictor)."""
        yield from ()

    def learning_rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        """(parameter, its share of the learning rate), for those that do not train at all of it (layer-wise decay)."""
        yield from ()

    def before_optimizer_step(self, progress: float) -> None:
        """Called once per optimiser step, gradients complete and not yet clipped."""

    def update_state(self) -> None:
        """Called once per optimiser step, after it: centres, queues and other non-gradient state."""

    def log_metrics(self, means: dict[str, Any]) -> dict[str, Any]:
        """What is logged of ``metrics``' means over a logging window, e.g. the ratio of two of them."""
        return means

    def row_inputs(self) -> Callable[..., dict[str, np.ndarray]] | None:
        """Draws what ``forward`` wants of each image beside its views: (rng, views) -> {input: array}; None: nothing.

        views: one image's, {key: uint8 (V, H, W, C)}. It runs where the views are drawn, in the workers, and ``rng``
        depends on seed, epoch and row number alone: processes, micro-batches and a resumed run draw alike.
        """
        return None

    # --- what every method has ------------------------------------------------------------------------------------

    def add_teacher(self) -> None:
        """Gives each part in ``followed`` an EMA teacher, ``teacher_<part>``; call it after all of them are made and
        before ``post_init``."""
        for part in self.followed:
            setattr(self, f"teacher_{part}", momentum.make_teacher(getattr(self, part)))

    def forward(
        self,
        pixel_values: Tensor,
        *views: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **named_views: Any,
    ) -> SSLOutput | tuple[Any, ...]:
        """(B, C, H, W) images alone are embedded (``embed``); whatever else comes with an axis of views, or with other
        inputs, is a training batch (``losses``, which says what the method takes).

        The last three arguments are those of transformers' models. ValueError where a batch has too few images.
        """
        named_views = {name: value for name, value in named_views.items() if value is not None}
        if pixel_values.ndim == self.input_ndim and not views and not named_views:
            asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
            chosen = {k: getattr(self.config, k, False) if given is None else given for k, given in asked.items()}
            output = self.embed(pixel_values, **{name: True for name, given in chosen.items() if given})
        else:
            self.check_batch(self.images_in(pixel_values, **named_views))
            output = self.losses(pixel_values, *views, **named_views)
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def check_batch(self, images: int, ranks: int | None = None) -> None:
        """ValueError where ``images`` of each rank are too few for the loss or for BatchNorm. ranks: None counts them.

        Accumulation does not help: every micro-batch is a batch of its own.
        """
        ranks = distributed.world_size() if ranks is None else ranks
        fewest, why = self.fewest_images()
        if images * ranks < fewest:
            raise ValueError(
                f"{self.paper.name} needs at least {fewest} images in the batch of all ranks, got {images * ranks}: "
                f"{why}. Raise per_device_train_batch_size; accumulation does not count."
            )
        if images > 1:
            return
        for layer in self.batch_statistics():
            if ranks == 1 or not isinstance(layer, distributed.CrossRankBatchNorm):
                raise ValueError(
                    f"{self.paper.name} needs at least 2 images in the batch of every rank, got 1: BatchNorm "
                    "normalises them by one another. Raise per_device_train_batch_size; accumulation does not count."
                )

    def check_size(self, key: str, height: int, width: int) -> None:
        """ValueError where views of that key and size do not suit the backbone."""
        backbones.check_size(backbones.unwrap(self.backbone).config, height, width, key in self.masked_views)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in transformers, from a published repo as well, whose ``ssl/`` holds the method; that is found by itself.

        With ``config`` the repo is any native one, and its weights become the backbone (a warm start). OSError where
        there is no method and no config. Weights are float32 whatever the checkpoint's are, unless ``dtype`` asks for
        something else; teachers and memories are float32 even then.
        """
        where = pretrained_model_name_or_path
        if where is None and config is None:
            raise ValueError("from_pretrained(None) reads nothing: give the config and, as state_dict, the weights")
        if where is not None and config is None and not kwargs.get("subfolder"):
            folder = method_folder(where, kwargs)
            if folder is None:
                raise OSError(
                    f"{where} holds a native model and no hf_ssl method. To start a {cls.__name__} from its weights "
                    "give a config: from_pretrained(..., config=...)"
                )
            kwargs["subfolder"] = folder
        with_master_weights(kwargs)
        try:
            return super().from_pretrained(where, *args, config=config, **kwargs)
        except TypeError as error:
            unknown = re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
            if unknown is None:
                raise
            config_class: Any = cls.config_class
            raise TypeError(config_class.no_field(unknown[1])) from error

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: in custom code transformers skips modules without parameters of their own when it initialises what a
        checkpoint lacks (CLIP's attention)."""
        return False

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return super()._from_config(config, **with_master_weights(kwargs))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SSLModel":
        """As ``nn.Module`` does for ``to``, ``half`` and their like, but teachers stay float32."""
        kept = {id(t) for _, teacher in self.teachers() for t in (*teacher.parameters(), *teacher.buffers())}
        return super()._apply(lambda t: memory.in_own_precision(fn, t) if id(t) in kept else fn(t), recurse)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Publish as ``hf_ssl.hub.push_model`` does: the native model in the root, the whole method in ``ssl/``.

        options: processor (default: the one it was built, trained or loaded with), private, revision, token, ...
        """
        hub = importlib.import_module("hf_ssl.hub")  # by name: the floor above, which the core does not need to exist
        return hub.push_model(self, repo_id=repo_id, **options)

    @property
    def progress(self) -> Tensor:
        """Share of the run that is done, a 0-d float tensor in [0, 1] (no device sync)."""
        return (self.step.float() / self.total_steps.float()).clamp(max=1.0)

    @torch.no_grad()
    def after_optimizer_step(self, progress: float | None = None) -> None:
        """EMA, centres and the step counter: exactly once per optimiser step, never per micro-batch.

        progress: where the run stood when this step began; read from the buffers if None (one device sync).
        """
        progress = float(self.progress) if progress is None else progress
        for student, teacher in self.teachers():
            momentum.ema_update(student, teacher, self.teacher_momentum(progress), self.teacher_buffers)
        self.update_state()
        self.step.add_(1)

    @property
    def average(self) -> Any:
        """The EMA of ``backbone`` that is published once the random start has faded from it; None: there is none."""
        return None

    @property
    def starts_random(self) -> bool:
        """Whether what ``average`` began with was untrained."""
        return not self.backbone.config.name_or_path

    def chosen_weights(self, steps: int | None = None, total: int | None = None) -> tuple[str, str]:
        """("average" or "last", why): the weights that are published, after ``steps`` of ``total`` (None: as it is).

        The average, unless more than ``start_left`` of it is still a random start, or validation images (never test
        images) answered otherwise: see ``validated``.
        """
        if self.average is None or self.step.is_meta:
            return ("last", "") if self.average is None else ("average", "")
        if self.validated is not None and steps is None:
            return self.validated
        steps, total = (int(self.step), int(self.total_steps)) if steps is None else (steps, total or steps)
        if not steps or not self.starts_random:
            return "average", "the average of the weights over the run"
        left = momentum.start_left(self.teacher_momentum, steps, total)
        words = f"after {steps:,} steps {left:.0%} of the average is still the random start"
        return ("last", words) if left > self.start_left else ("average", words)

    def validate_weights(self, average: float, last: float) -> None:
        """Accuracies on validation images: the better weights are published, and of equals the average."""
        chosen = "average" if average >= last else "last"
        self.validated = (
            chosen,
            f"on validation images the average scores {average:.3f} and the last weights {last:.3f}",
        )

    @property
    def export_backbone(self) -> PreTrainedModel:
        """The native model that is published: the backbone, or its average where ``chosen_weights`` says so."""
        return self.average if self.chosen_weights()[0] == "average" else self.backbone

    def features(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), from the model that would be exported."""
        return backbones.features(self.export_backbone, pixel_values)

    def patch_tokens(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), from the model that would be exported."""
        return backbones.patch_tokens(self.export_backbone, pixel_values)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As in transformers; our own decoder follows. ``precision="auto"`` then leaves the attention alone."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self.attention_given = True
        for module in self.modules():
            if isinstance(module, heads.TransformerDecoder):
                module.config._attn_implementation = self.backbone.config._attn_implementation

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but under the names of ``state_dict``: Trainer resumes by them.

        transformers' default writes a ViT's blocks under their old names, and a resumed run would silently start them
        from random weights.
        """
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def floating_point_ops(self, input_dict: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """0: transformers' estimate, asked for at every step, takes each pixel for a token."""
        return 0

    def train(self, mode: bool = True) -> "SSLModel":
        """As ``nn.Module.train``; also re-freezes what must not train (``from_pretrained`` unfreezes everything)."""
        super().train(mode)
        for _, teacher in self.teachers():
            momentum.teacher_mode(teacher, mode and not self.teacher_buffers)
        for parameter in self.frozen_parameters():
            parameter.requires_grad_(False)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Heads, then (``module is self`` comes last) counters and teacher := student; loaded values stay."""
        heads.init_head(module, xavier=self.xavier)
        if isinstance(module, memory.State):
            module.reset()
        if module is self:
            init.zeros_(self.step)
            init.ones_(self.total_steps)
            for student, teacher in self.teachers():
                momentum.copy_state(student, teacher)
