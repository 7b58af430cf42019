"""What every labelled + unlabelled method shares: a native image classifier, its EMA twin and the two-part loss.

A method states how unlabelled images are labelled (``targets``); where it also changes a loss it overrides
``supervised_loss`` or ``unlabeled_loss``. The classes are the backbone config's: ``num_labels``, ``id2label``.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from . import backbones, distributed
from .loading import from_config, load_pretrained
from .memory import State
from .modeling import SSLConfig, SSLModel, SSLOutput, with_master_weights
from .momentum import make_teacher

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@strict
class SemiSupervisedConfig(SSLConfig):
    """backbone_config: of a native image classifier, its classes in num_labels or id2label. unlabeled_weight: λ of the
    unlabelled loss. ema_momentum: per optimiser step; a run of a few thousand steps wants less than .999."""

    unlabeled_weight: float | int = 1.0
    ema_momentum: float | int = 0.999

    def __post_init__(self, **kwargs):
        if self.unlabeled_weight < 0:
            raise ValueError(f"unlabeled_weight must not be negative, got {self.unlabeled_weight}")
        if not 0 <= self.ema_momentum <= 1:
            raise ValueError(f"ema_momentum must lie in [0, 1], got {self.ema_momentum}")
        super().__post_init__(**kwargs)


@dataclass
class SemiSupervisedOutput(SSLOutput):
    """logits: (B, K), of the labelled images in training, of the images given otherwise."""

    logits: Tensor | None = None


class SemiSupervisedModel(SSLModel):
    """A native ``ForImageClassification`` model, trained, and its moving average ``ema``, evaluated and exported.

    The average covers BatchNorm's statistics, never runs in training and is always in evaluation mode.
    ``from_pretrained(<native repo>, config=...)`` starts from a native backbone or classifier; a classifier's head of
    another size is drawn anew.
    """

    config: SemiSupervisedConfig
    reads = "labels"
    publishes = "classifier"
    can_collapse = False  # one answer for all images cannot satisfy the labelled ones
    teacher_buffers: ClassVar[bool] = True

    def add_parts(self, config: SemiSupervisedConfig) -> None:
        self.ema: Any = make_teacher(self.backbone)

    def build_backbone(self, config: PreTrainedConfig) -> PreTrainedModel:
        if (config.num_labels or 0) < 2:
            raise ValueError(
                f"a classifier needs at least 2 classes, got num_labels={config.num_labels}: set num_labels or "
                "id2label in backbone_config"
            )
        classifier = from_config(AutoModelForImageClassification, config, dtype=torch.get_default_dtype())
        if not backbones.is_timm(classifier) and backbones.unwrap(classifier) is classifier:
            raise ValueError(
                f"{type(classifier).__name__} has no base model under its head: take a backbone whose classifier "
                "wraps one (ViT, ResNet, ConvNeXt V2, Swin, DINOv2, a timm model)"
            )
        backbones.make_classifier(classifier)
        return classifier

    # --- what a method may override -------------------------------------------------------------------------------

    def targets(self, logits: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weak-view logits (U, K) of unlabelled images -> targets (U, K), probabilities, and weights (U,) >= 0.

        Called without gradient, once per micro-batch. index: (U,) row numbers in the unlabelled source, for methods
        that keep state per image. State that changes here must agree over ranks (``distributed``).
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how unlabelled images are labelled: targets()")

    def supervised_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, K), (B,) -> (): mean cross-entropy."""
        return F.cross_entropy(logits.float(), labels)

    def unlabeled_loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Strong-view logits (U, K) against ``targets``' answer -> (), before ``unlabeled_weight``."""
        return consistency(logits, targets, weights)

    # --- what every method has ------------------------------------------------------------------------------------

    def embed(self, pixel_values: Tensor, **wanted: bool) -> SemiSupervisedOutput:
        """The class scores of the weights that are published, too."""
        logits, embeddings, outputs = backbones.classify_with_outputs(self.export_backbone, pixel_values, **wanted)
        states, attentions = (outputs.get(name) for name in ("hidden_states", "attentions"))
        return SemiSupervisedOutput(embeddings=embeddings, hidden_states=states, attentions=attentions, logits=logits)

    def images_in(self, pixel_values: Tensor, **views: Any) -> int:
        return len(pixel_values) + len(views.get("weak_pixel_values", ()))

    def losses(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        weak_pixel_values: Tensor | None = None,
        strong_pixel_values: Tensor | None = None,
        unlabeled_labels: Tensor | None = None,
        unlabeled_index: Tensor | None = None,
    ) -> SemiSupervisedOutput:
        """pixel_values: (B, V, C, H, W) labelled views, or (B, C, H, W), with labels (B,) in [0, K).

        weak_pixel_values (U, 1, C, H, W), strong_pixel_values (U, Vs, C, H, W): the unlabelled images; without them
        the run is a supervised one. unlabeled_labels (U,): true labels, -1 = unknown, for the metrics alone.
        embeddings: (B·V + U, D) of the labelled and the weak views in training (the same pass gives them).
        """
        if labels is None or (weak_pixel_values is None) != (strong_pixel_values is None):
            raise ValueError(
                "a training batch needs labels with its pixel_values, and weak_pixel_values together with "
                "strong_pixel_values"
            )
        if pixel_values.ndim == 5:
            labels, pixel_values = labels.repeat_interleave(pixel_values.shape[1]), pixel_values.flatten(0, 1)
        if weak_pixel_values is None or strong_pixel_values is None:
            logits, embeddings = backbones.classify(self.backbone, pixel_values)
            loss = self.supervised_loss(logits, labels)
            metrics = {"supervised_loss": loss.detach()}
            return SemiSupervisedOutput(loss, embeddings.detach(), metrics, logits=logits)
        if weak_pixel_values.shape[1] != 1:
            raise ValueError(f"an unlabelled image has one weak view, got {weak_pixel_values.shape[1]}")
        logits, weak, strong, embeddings = self._classify_together(
            pixel_values, weak_pixel_values.flatten(0, 1), strong_pixel_values.flatten(0, 1)
        )
        with torch.no_grad():
            targets, weights = self.targets(weak.detach().float(), unlabeled_index)
        views = strong_pixel_values.shape[1]
        supervised = self.supervised_loss(logits, labels)
        unlabeled = self.unlabeled_loss(
            strong, targets.repeat_interleave(views, 0), weights.repeat_interleave(views, 0)
        )
        metrics = {"supervised_loss": supervised.detach(), "unlabeled_loss": unlabeled.detach()}
        metrics |= pseudo_label_metrics(targets, weights, unlabeled_labels)
        loss = supervised + self.config.unlabeled_weight * unlabeled
        return SemiSupervisedOutput(loss, embeddings.detach(), metrics, logits=logits)

    def _classify_together(
        self, labeled: Tensor, weak: Tensor, strong: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of the three parts, each (rows, K), and the features (labelled + weak rows, D).

        BatchNorm must see labelled, weak and strong images as one batch, and its statistics carry gradient from every
        row: one pass, rows interleaved so that chunked statistics see a mixture. Without BatchNorm rows do not
        meet, and the weak ones, which get no gradient, need no backward pass.
        """
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.backbone.modules()):
            with torch.no_grad():
                weak_logits, weak_features = backbones.classify(self.backbone, weak)
            logits, features = backbones.classify(self.backbone, torch.cat([labeled, strong]))
            first, last = logits.split([len(labeled), len(strong)])
            return first, weak_logits, last, torch.cat([features[: len(labeled)], weak_features])
        rows = torch.cat([labeled, weak, strong])
        order = interleave_order(len(rows), len(labeled), rows.device)
        logits, features = (output[order.argsort()] for output in backbones.classify(self.backbone, rows[order]))
        first, middle, last = logits.split([len(labeled), len(weak), len(strong)])
        return first, middle, last, features[: len(labeled) + len(weak)]

    @property
    def average(self) -> PreTrainedModel:
        return self.ema

    @property
    def starts_random(self) -> bool:
        return True  # the head, whatever the backbone was

    def teachers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.backbone, self.ema

    def teacher_momentum(self, progress: float) -> float:
        return float(self.config.ema_momentum)

    def log_metrics(self, means: dict[str, Any]) -> dict[str, Any]:
        """pseudo_label_accuracy: the share that is right among kept pseudo-labels whose truth is known, if any."""
        logged = {key: value for key, value in means.items() if key not in ("kept_known", "kept_correct")}
        if means.get("kept_known", 0) > 0:
            logged["pseudo_label_accuracy"] = means["kept_correct"] / means["kept_known"]
        return logged

    # --- warm starts ----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As ``PreTrainedModel.from_pretrained``; a native repo fills backbone and ema and leaves the step at 0.

        Its missing and mismatched keys (a new head, a head of another size) are in the loading info.
        """
        with_master_weights(kwargs)
        if pretrained_model_name_or_path is None:  # weights that the caller holds: state_dict
            return super().from_pretrained(None, *args, config=config, **kwargs)
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        config_class: Any = cls.config_class
        stored = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)[0].get("model_type", "")
        if stored == config_class.model_type:
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        if stored.startswith("ssl_"):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds the method {stored.removeprefix('ssl_')!r}: start from the "
                "run folder itself, whose root is the native backbone"
            )
        return cls._from_native(pretrained_model_name_or_path, config, **kwargs)

    @classmethod
    def _from_native(cls, repo: Any, config: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        wanted = None if config is None else copy.deepcopy(config.backbone_config)
        classifier, report = load_pretrained(
            AutoModelForImageClassification, repo, config=wanted, ignore_mismatched_sizes=True,
            output_loading_info=True, **kwargs,
        )  # fmt: skip
        bad = [key for key, *_ in report["mismatched_keys"] if not _in_head(classifier, key)]
        if bad:
            raise ValueError(
                f"{repo} does not fit backbone_config in the shape of {', '.join(sorted(bad)[:3])}: take the "
                "checkpoint's own config and change only its classes"
            )
        config_class: Any = cls.config_class
        model = cls(config_class(backbone_config=classifier.config) if config is None else config)
        model.backbone, model.ema = classifier, make_teacher(classifier)
        model.eval()
        for kind in ("missing_keys", "unexpected_keys"):
            report[kind] = {f"backbone.{key}" for key in report[kind]}
        report["mismatched_keys"] = {(f"backbone.{key}", *shapes) for key, *shapes in report["mismatched_keys"]}
        return (model, report) if output_loading_info else model


def _in_head(classifier: Any, key: str) -> bool:
    """Whether a parameter belongs to the classifying layers on top of the base model."""
    if backbones.is_timm(classifier):
        head = {id(parameter) for parameter in classifier.timm_model.get_classifier().parameters()}
        return id(dict(classifier.named_parameters()).get(key)) in head
    return not key.startswith(f"{classifier.base_model_prefix}.")


class DistributionAlignment(State):
    """Makes guesses as frequent per class as the labels are (ReMixMatch, Berthelot et al. 2020, section 3.1).

    p ← normalise(p · labelled frequency / mean guess). Both are moving averages over all ranks' batches and follow
    once per optimiser step; the mean guess counts the batch at hand as well, and the first batch sets it.
    """

    def __init__(self, classes: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.labeled = nn.Buffer(torch.full((classes,), 1 / classes, dtype=torch.float32))
        self.guessed = nn.Buffer(torch.full((classes,), 1 / classes, dtype=torch.float32))
        self.started = nn.Buffer(torch.zeros((), dtype=torch.float32))
        # of the micro-batches since the last optimiser step: labels and guesses per class, and how many
        self.sums = nn.Buffer(torch.zeros(2, classes, dtype=torch.float32))
        self.counts = nn.Buffer(torch.zeros(2, 1, dtype=torch.float32))

    def reset(self) -> None:
        for buffer in (self.started, self.sums, self.counts):
            init.zeros_(buffer)
        for buffer in (self.labeled, self.guessed):
            init.constant_(buffer, 1 / len(buffer))

    @torch.no_grad()
    def observe(self, labels: Tensor) -> None:
        """Count a micro-batch's labels (B,)."""
        self._add(0, F.one_hot(labels, len(self.labeled)).float())

    @torch.no_grad()
    def forward(self, probabilities: Tensor) -> Tensor:
        """(U, K) -> (U, K), rows sum to 1. In training the guesses are counted."""
        batch = distributed.all_mean(probabilities.mean(0), float(len(probabilities)))
        mean = torch.where(self.started > 0, self.guessed.lerp(batch, 1 - self.momentum), batch)
        if self.training:
            self._add(1, probabilities)
        aligned = probabilities * (self.labeled + 1e-6) / (mean + 1e-6)
        return aligned / aligned.sum(-1, keepdim=True)

    def _add(self, row: int, values: Tensor) -> None:
        self.sums[row] += values.sum(0)
        self.counts[row] += len(values)

    @torch.no_grad()
    def update(self) -> None:
        """Let both averages follow; once per optimiser step."""
        means = self.sums / self.counts.clamp(min=1)
        labels, guesses = (distributed.all_mean(mean, count) for mean, count in zip(means, self.counts))
        self.labeled.lerp_(labels, 1 - self.momentum)
        self.guessed.copy_(torch.where(self.started > 0, self.guessed.lerp(guesses, 1 - self.momentum), guesses))
        self.started.fill_(1)
        self.sums.zero_()
        self.counts.zero_()


def interleave_order(rows: int, groups: int, device: Any = None) -> Tensor:
    """Order (rows,) in which [x, u_weak, u_strong] pass through the network: as the columns of a table.

    The published code writes the rows into a table of ``groups`` lines (the labelled count) and reads its columns, so
    that statistics over chunks of a pass see a mixture. The last line may be longer here.
    """
    place = torch.arange(rows, device=device)
    return (place % max(rows // max(groups, 1), 1) * rows + place).argsort()


def consistency(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over ALL rows of weight · CE(target, softmax(logits)), in float32; (U, K), (U, K), (U,) -> ().

    Rows of weight 0 count in the denominator: few confident rows make a small loss, not a loud one.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return (weights * F.cross_entropy(logits.float(), targets.float(), reduction="none")).mean()


@torch.no_grad()
def pseudo_label_metrics(targets: Tensor, weights: Tensor, truth: Tensor | None = None) -> dict[str, Tensor]:
    """utilisation: mean weight. pseudo_label_histogram (K,): its share per class; sums to utilisation.

    With truth (U,), -1 = unknown: kept_known and kept_correct, shares of all rows, whose ratio is the accuracy
    (``SemiSupervisedModel.log_metrics``): a mean of batchwise ratios would be another number.
    """
    guess = targets.argmax(-1)
    kept = F.one_hot(guess, targets.shape[-1]) * weights.unsqueeze(-1)
    metrics = {"utilisation": weights.mean(), "pseudo_label_histogram": kept.mean(0)}
    if truth is not None:
        metrics["kept_known"] = (weights * (truth >= 0)).mean()
        metrics["kept_correct"] = (weights * (truth == guess)).mean()
    return metrics
