"""SSLTrainer: ``transformers.Trainer`` with views for data, the method's hooks, exact resume and clear failures."""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import has_length

from .. import distributed
from ..data.collator import BadImageLedger, BatchLoader, TooManyBadImages, build_dataloader
from ..data.sources import ImageSource
from ..modeling import SSLModel
from ..processing import SSLImageProcessor
from .arguments import SSLTrainingArguments
from .callbacks import HealthCallback, MethodCallback, StopCallback
from .lars import LARS
from .optim import decay_names, scaled_learning_rate

_LEDGER_FILE = "skipped_images.json"


class CheckpointError(OSError):
    """A checkpoint could not be written; the earlier ones are untouched."""


class SSLTrainer(Trainer):
    """Trains a method on an ``ImageSource``; everything else is ``Trainer``.

    model: a method. train_source: images (labels are never read). processing_class: the method's image processor.
    eval_bank, eval_queries: labelled sources for the kNN that ``evaluate()`` runs (``--eval_strategy steps``).

    ``train`` raises TooManyBadImages (after saving a checkpoint) when more than ``max_bad_fraction`` of the images
    cannot be read, and CheckpointError when a checkpoint cannot be written. After SIGTERM it saves, returns, and
    ``terminated`` is True. A resumed run continues exactly where the checkpoint was taken.
    """

    def __init__(
        self,
        model: SSLModel,
        args: SSLTrainingArguments,
        train_source: ImageSource,
        processing_class: SSLImageProcessor,
        eval_bank: ImageSource | None = None,
        eval_queries: ImageSource | None = None,
        shuffle_buffer: int = 4096,
        **kwargs: Any,
    ):
        if args.base_learning_rate is not None:
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            args.learning_rate = scaled_learning_rate(args.base_learning_rate, model.lr_scaling, batch)
        if args.world_size > 1 and args.sync_batchnorm:
            distributed.synchronise_batchnorm(model)
        self.train_source, self.eval_bank, self.eval_queries = train_source, eval_bank, eval_queries
        self.shuffle_buffer = shuffle_buffer
        self.views = processing_class
        self.ledger = BadImageLedger()
        self.last_embeddings: Tensor | None = None
        self.last_metrics: dict[str, Tensor] = {}
        self.last_loss: Tensor | float = 0.0
        self._window: dict[str, tuple[Tensor | float, int]] = {}  # metric -> (sum, count) since the last log
        self._images, self._clock = 0, time.perf_counter()
        kwargs.setdefault("eval_dataset", None if eval_queries is None else eval_queries.dataset)
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        self.stopper = StopCallback(self)
        for callback in (MethodCallback(self), HealthCallback(self), self.stopper):
            self.add_callback(callback)

    @property
    def method(self) -> SSLModel:
        """The method itself, whatever DDP, FSDP or compile wrapped around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def terminated(self) -> bool:
        """Whether the last ``train`` ended early because of SIGTERM."""
        return self.stopper.terminated

    # --- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> "EpochLoader":  # type: ignore[override]
        args = self.args
        batches = build_dataloader(
            self.train_source,
            self.processing_class,
            self._train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            num_workers=args.dataloader_num_workers,
            shuffle_buffer=self.shuffle_buffer,
        )
        batches.ledger.load_state_dict(self.ledger.state_dict())
        self.ledger = batches.ledger
        self._loader = EpochLoader(batches)
        return self._loader

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, skipped = super()._init_training_state(*args, **kwargs)
        self._loader.resume(epochs, skipped)
        return epochs, skipped

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        try:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        except TooManyBadImages:
            self._save_checkpoint(self.model_wrapped, trial=None)
            raise

    # --- one step -------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs)
        self.last_embeddings = outputs.embeddings.detach()
        self.last_metrics = outputs.metrics or {}
        self.last_loss = outputs.loss.detach()
        self.note(self.last_metrics)
        self._images += len(inputs[self.method.main_input_name])
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def note(self, metrics: dict[str, Tensor] | dict[str, float]) -> None:
        """Add metrics to the current logging window; they are averaged over its micro-batches and over ranks."""
        for name, value in metrics.items():
            total, count = self._window.get(name, (0.0, 0))
            self._window[name] = (total + value, count + 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window:
            window = [torch.as_tensor(total).float().cpu() / count for total, count in self._window.values()]
            means = distributed.all_mean(torch.stack(window).to(self.args.device))
            logs.update(zip(self._window, means.tolist()))
            now = time.perf_counter()
            logs["images_per_second"] = self._images * self.args.world_size / max(now - self._clock, 1e-9)
            if self.ledger.skipped:
                logs["skipped_images"] = self.ledger.skipped
            self._window, self._images, self._clock = {}, 0, now
        super().log(logs, start_time)

    # --- optimiser ------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return sorted(decay_names(model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.use_lars:
            self.optimizer_cls_and_kwargs = (LARS, {"lr": self.args.learning_rate})
        optimizer = super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        names = decay_names(trained)
        decayed = {id(parameter) for name, parameter in trained.named_parameters() if name in names}
        for group in optimizer.param_groups:
            group["decayed"] = all(id(parameter) in decayed for parameter in group["params"])
            if self.args.use_lars:
                group["always_adapt"] = group["decayed"]
        return optimizer

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """kNN of the exported backbone: ``eval_knn_<label>`` per label column, ``eval_knn_top1`` for the first."""
        if self.eval_bank is None or self.eval_queries is None:
            raise ValueError("evaluate() needs labelled images: pass eval_bank and eval_queries to SSLTrainer")
        method = self.whole_method()
        pair = (self.eval_bank, self.eval_queries)
        shared = [None if method is None else self._knn(method, *pair, metric_key_prefix)]
        if distributed.world_size() > 1:
            dist.broadcast_object_list(shared)
        metrics = dict(shared[0] or {})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _knn(
        self, method: SSLModel, bank_source: ImageSource, query_source: ImageSource, prefix: str
    ) -> dict[str, float]:
        from ..evaluation import extract_features, knn_accuracy

        processor = self.views.eval_processor()
        bank, queries = (
            extract_features(
                method.export_backbone, source, processor, device=self.args.device, progress=False,
                max_images=self.args.knn_images,
            )
            for source in (bank_source, query_source)
        )  # fmt: skip
        metrics: dict[str, float] = {}
        for label in query_source.labels:
            scores = knn_accuracy(
                bank.embeddings, bank.labels[label], queries.embeddings, queries.labels[label], k=(20,)
            )
            metrics[f"{prefix}_knn_{label}"] = scores["knn20_top1"]
        return {f"{prefix}_knn_top1": next(iter(metrics.values())), **metrics} if metrics else metrics

    def whole_method(self) -> SSLModel | None:
        """The method with all of its weights on the first process, None on the others. Every process must call it."""
        if not self.is_fsdp_enabled:
            return self.method if self.args.process_index == 0 else None
        state = self.accelerator.get_state_dict(self.model)
        if self.args.process_index != 0:
            return None
        with torch.random.fork_rng():
            whole = type(self.method)(self.method.config)
        whole.load_state_dict(state)
        return whole

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no complete checkpoint in {self.args.output_dir} to resume from")
        if resume_from_checkpoint:
            ledger = Path(str(resume_from_checkpoint), _LEDGER_FILE)
            if ledger.is_file():
                self.ledger.load_state_dict(json.loads(ledger.read_text()))
        self._images, self._clock = 0, time.perf_counter()
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            self.stopper.restore()
        if self.stopper.error is not None:
            raise self.stopper.error
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search(r"StreamWriter|inline_container|write", str(error)):
                raise
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            last = last_complete_checkpoint(str(self.args.output_dir))
            kept = f"The last good checkpoint is {last}." if last else "There is no earlier checkpoint."
            raise CheckpointError(
                f"cannot write the checkpoint {folder}: {error}. {kept} Free some space or choose another "
                "--output_dir, then run the same command with --resume_from_checkpoint true."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(str(output_dir or self.args.output_dir))
        if self.args.should_save:
            with contextlib.suppress(FileNotFoundError):
                os.remove(folder / "training_args.bin")  # a pickle; the same facts as text, tokens masked
            (folder / "training_args.json").write_text(self.args.to_json_string())
            (folder / _LEDGER_FILE).write_text(json.dumps(self.ledger.state_dict()))

    def skipped_images(self) -> dict[str, Any]:
        """{"count": images left out by all ranks, "names": "file or row: reason"}. Every rank must call it."""
        merged = self.merged_ledger()
        return {"count": merged.distinct, "names": merged.names}

    def merged_ledger(self) -> BadImageLedger:
        """The ledger of all ranks; a collective call."""
        mine = self.ledger.state_dict()
        states = [mine] * distributed.world_size()
        if len(states) > 1:
            dist.all_gather_object(states, mine)
        return BadImageLedger.merged(states, self.ledger.total)


class EpochLoader:
    """What Trainer sees of a ``BatchLoader``: a resume that seeks, where Trainer would decode and throw away.

    Trainer skips the batches it has already trained on through Accelerate's ``skip_first_batches``; ``dataset`` hands
    that placeholders instead of real batches.
    """

    # How skip_first_batches must wrap ``dataset``: one item is one batch, made in this process.
    batch_size, drop_last, num_workers, prefetch_factor = None, False, 0, None

    def __init__(self, batches: BatchLoader):
        self.batches = batches
        self.placeholders = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.batches)

    def resume(self, epochs: int, skipped: int) -> None:
        """Continue after ``epochs`` whole epochs and ``skipped`` batches of the next."""
        length = len(self) if has_length(self) else 0
        self.batches.seek(epochs * length + skipped)
        self.placeholders = skipped

    @property
    def dataset(self) -> IterableDataset:
        return _Placeholders(self)


class _Placeholders(IterableDataset):
    def __init__(self, loader: EpochLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.loader.placeholders):
            yield 0
        yield from self.loader


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint whose state file, written last, can be read; a run killed while saving leaves others."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(folder)
    return None
