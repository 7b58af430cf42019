"""SSLTrainer: ``transformers.Trainer`` with views for data, the method's hooks, exact resume and clear failures."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import distributed
from ..backbones import prepare_to_train, unwrap
from ..data.collator import BadImageLedger, BatchLoader, TooManyBadImages, build_dataloader
from ..data.labels import LabeledImages, LabeledRows
from ..data.remote import RemoteError
from ..data.sources import ImageSource, SourceError
from ..data.splits import for_testing, trained_queries, without
from ..data.variety import nothing_to_learn
from ..data.workers import WaitEnded, WorkerError
from ..documents import read_json
from ..hub import scrub
from ..modeling import SSLModel
from ..processing import SSLImageProcessor
from ..untouched import untouched
from . import precision
from .arguments import SSLTrainingArguments
from .build import check_rows
from .callbacks import HealthCallback, MethodCallback
from .checkpointing import CheckpointingTrainer
from .checkpoints import last_complete_checkpoint
from .fits import check_fits
from .inputs import check_arguments, check_choice, each, measured_images, one_of, training_images
from .kinds import kind_of
from .lock import lock
from .nonfinite import NonFiniteCallback, replay
from .optim import decay_names, hold_constant_rates, mark_groups, own_optimiser, scaled_learning_rate
from .resume import EpochLoader
from .stopping import ProcessLost, StopCallback, process_lost

logger = logging.getLogger("hf_ssl.training")

_LEDGER_FILE, _LABELED_FILE = "skipped_images.json", "labeled_rows.json"


class CheckpointError(OSError):
    """A checkpoint could not be written; the earlier ones are untouched."""


def _make_ready(model: SSLModel, args: SSLTrainingArguments, images: int, views: SSLImageProcessor) -> None:
    """Put ``model`` into the state that it trains in. ValueError where ``images`` a batch or the views do not suit."""
    prepare_to_train(model)
    if args.world_size > 1 and args.sync_batchnorm:
        distributed.synchronise_batchnorm(model)
    model.train()  # as training will have it: BatchNorm in evaluation needs no other images
    model.check_batch(images, args.world_size)
    for key, (height, width) in views.view_sizes.items():
        model.check_size(key, height, width)
        count = images * views.count_views([key])
        check_fits(unwrap(model.backbone).config, height, width, views.num_channels, count)


class SSLTrainer(CheckpointingTrainer):
    """Trains a method on images; everything else is ``Trainer``.

    model: a method. train_dataset (or train_source): the images, anything that ``load_source`` reads, such as a
    Dataset or IterableDataset; labels are never read. processing_class: the method's image processor; default: the one
    that the model was built with. eval_dataset (or eval_queries): labelled images that ``evaluate()`` measures on, or
    a dict of them; eval_bank: those that vote for them in kNN, default: the other training images, where labelled.
    labeled: the ``LabeledImages`` of a method that reads labels; default: all labelled training images. A batch then
    has per_device_train_batch_size of them and ``unlabeled_ratio`` times as many of the training images.

    Arguments of Trainer without a use here (data_collator, compute_metrics, ...) are a TypeError that says what to do.
    ``train`` raises TooManyBadImages (after saving a checkpoint) when more than ``max_bad_fraction`` of the images
    cannot be read, CheckpointError when a checkpoint cannot be written, NonFiniteError after ``nonfinite_steps`` steps
    without a finite loss, or before it would save weights that are not finite, RunLocked when another run writes into
    ``output_dir``, and ProcessLost when another process of the run has ended. After SIGTERM it saves, returns, and
    ``terminated`` is True; after Ctrl-C it saves and raises KeyboardInterrupt. A resumed run continues exactly where
    the checkpoint was taken.
    """

    def __init__(
        self,
        model: SSLModel,
        args: SSLTrainingArguments,
        train_source: Any = None,
        processing_class: SSLImageProcessor | None = None,
        eval_bank: Any = None,
        eval_queries: Any = None,
        shuffle_buffer: int = 4096,
        labeled: LabeledImages | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ):
        args = SSLTrainingArguments("tmp_trainer") if args is None else args  # as in Trainer
        views: Any = processing_class or getattr(model, "processor", None)
        train_source = one_of(train_source, train_dataset, ("train_source", "train_dataset"))
        train_source = training_images(train_source, views)
        check_arguments(model, args, views, kwargs)
        eval_queries = one_of(eval_queries, eval_dataset, ("eval_queries", "eval_dataset"))
        eval_bank, eval_queries = (measured_images(data, train_source) for data in (eval_bank, eval_queries))
        chosen_on = each(eval_queries)
        check_choice(args, chosen_on)
        self.kind = kind_of(model.reads)
        self.labeled = self.kind.labeled(model, train_source, args.seed) if labeled is None else labeled
        if args.base_learning_rate is not None:
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            args.learning_rate = scaled_learning_rate(args.base_learning_rate, model.lr_scaling, batch)
        ratio = 0 if self.labeled is None else self.labeled.unlabeled_ratio
        _make_ready(model, args, args.per_device_train_batch_size * (1 + ratio), views)
        self.train_source, self.eval_bank, self.eval_queries = train_source, eval_bank, eval_queries
        self.shuffle_buffer = shuffle_buffer
        self.views = model.processor = views
        trained = (train_source, None if self.labeled is None else self.labeled.source)
        self.trained_queries = sum(trained_queries(source, *trained, bank=eval_bank) for source in chosen_on)
        self._voting: tuple[ImageSource, ImageSource] | None = None  # the last queries, and who votes for them
        self.card_facts = {}
        self.ledger = BadImageLedger()
        self._loader: EpochLoader | None = None
        self.precision: precision.Choice | None = None  # settled when training starts
        self.precision_of: str | None = None  # a folder that says it, where no checkpoint does
        self.last_embeddings: Tensor | None = None
        self.last_metrics: dict[str, Tensor] = {}
        self.last_loss: Tensor | float = 0.0
        self._window: dict[str, tuple[Tensor | float, int]] = {}  # metric -> (sum, count) since the last log
        self._images, self._clock = 0, time.perf_counter()
        self._unwrapped: tuple[Any, Any] = (None, None)
        asked = {source.name: source.dataset for source in chosen_on} or None  # Trainer wants to know whether any is
        super().__init__(model=model, args=args, processing_class=views, eval_dataset=asked, **kwargs)
        self.train_dataset = train_source.dataset
        for source in chosen_on if args.eval_strategy != "no" else ():
            self._bank(source)  # now, not after hours
        if args.world_size > 1:
            distributed.leave_at_exit()
        self.stopper, self.nonfinite = StopCallback(self), NonFiniteCallback(self)
        for callback in (MethodCallback(self), HealthCallback(self), self.nonfinite, self.stopper):
            self.add_callback(callback)

    @property
    def method(self) -> SSLModel:
        """The method itself, whatever DDP, FSDP or compile wrapped around it."""
        if self._unwrapped[0] is not self.model:  # unwrapping takes half a millisecond, and a step asks three times
            self._unwrapped = (self.model, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        return self._unwrapped[1]

    @property
    def terminated(self) -> bool:
        """Whether the last ``train`` ended early because of SIGTERM, at this rank or another."""
        return self.stopper.stopped == signal.SIGTERM

    # --- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> "EpochLoader":  # type: ignore[override]
        args = self.args
        batches = self._build_loader(
            self._train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            num_workers=args.dataloader_num_workers,
            shuffle_buffer=self.shuffle_buffer,
        )
        batches.ended = lambda: self.stopper.stopped is not None
        batches.ledger.load_state_dict(self.ledger.state_dict())
        batches.ledger.silent = args.process_index > 0  # `skipped_images` says what the others met
        self.ledger = batches.ledger
        self._loader = EpochLoader(batches)
        return self._loader

    def _build_loader(self, batch_size: int, **options: Any) -> BatchLoader:
        return build_dataloader(
            self.train_source,
            self.processing_class,
            batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            labeled=None if self.labeled is None else self.labeled.source,
            ratio=0 if self.labeled is None else self.labeled.unlabeled_ratio,
            encode_text=getattr(self.processing_class, "encode_text", None),
            # of two streams the unlabelled rows' numbers come anyway, as unlabeled_index
            keep_columns=("_index",) if self.method.needs_index and self.labeled is None else (),
            row_inputs=self.method.row_inputs(),
            **options,
        )

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, skipped = super()._init_training_state(*args, **kwargs)
        assert self._loader is not None
        self._loader.resume(epochs, skipped)
        return epochs, skipped

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        try:
            samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            self.nonfinite.note_rows(self.state.global_step + 1, samples)
            return samples, count
        except (TooManyBadImages, RemoteError, SourceError, WorkerError, WaitEnded):
            # where data ended for this process alone, the others wait for its gradient and cannot save with it
            if (step := self.state.global_step) and distributed.all_arrive(f"the end of data at step {step}"):
                self.save_checkpoint()
            raise

    # --- precision ------------------------------------------------------------------------------------------------

    def _settle_precision(self, checkpoint: str | None) -> None:
        """As the checkpoint was trained, else as stated, else what suits the machine, by the first process."""
        args, model = self.args, self.method
        stated = "bf16" if args.bf16 else "fp16" if args.fp16 else args.precision
        origin = checkpoint or self.precision_of
        choice = precision.restore(origin, model, stated) if origin else None
        offered = precision.candidates(model, stated)
        if choice is None and len(offered) == 1:
            choice = offered[0]
        elif choice is None and (why := self._not_measured()):
            choice = precision.plain(stated, why)
        self.precision = choice or self._measured(stated)
        if args.precision == "auto" and (args.bf16 or args.fp16):
            self.precision = replace(self.precision, said=f"{stated}: this device computes it natively")
        precision.apply(model, self.precision)

    def _not_measured(self) -> str:
        """Why nothing is measured before this run; "" where it is."""
        if self.is_fsdp_enabled or self.args.deepspeed:
            return "sharded models are not measured"
        short = self._planned_steps() < precision.WORTH_STEPS
        return f"runs of fewer than {precision.WORTH_STEPS} steps are not measured" if short else ""

    def _measured(self, stated: str) -> precision.Choice:
        method = self.method
        chosen = distributed.from_first(lambda: precision.choose(method, self._prepare_inputs(self._sample()), stated))
        if self.args.process_index == 0:
            print(chosen.said, flush=True)
        return chosen

    def _planned_steps(self) -> float:
        args, rows = self.args, self.train_source.num_rows
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return args.max_steps if args.max_steps > 0 else args.num_train_epochs * (rows or 0) / batch

    def _sample(self) -> dict[str, Any]:
        """A batch from a loader of its own: the run's stream, ledger and random numbers do not notice."""
        size = max(min(self._train_batch_size, precision.ROWS), self.method.fewest_images()[0], 2)
        loader = self._build_loader(size, rank=0, world_size=1, num_workers=0, shuffle_buffer=1)
        loader.ledger.silent = True
        return next(iter(loader))

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Accelerate's own where bf16 was stated from the start; this one where it was measured or restored."""
        bf16 = self.precision is not None and self.precision.precision == "bf16" and not self.args.bf16
        if not bf16:
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=bool(cache_enabled))

    # --- one step -------------------------------------------------------------------------------------------------

    def _prepare_input(self, data: Any) -> Any:
        """As in Trainer, but a pinned tensor's way to the device holds nobody up."""
        if isinstance(data, Tensor):
            data = data.to(self.args.device, non_blocking=data.is_pinned())
        return super()._prepare_input(data)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device, its uint8 views normalised there; `_index` goes to the model as ``index``.

        What the method reads on the host stays there, as NumPy arrays: DDP would send a tensor to the device.
        """
        if self.method.needs_index:
            numbers = inputs.get("_index" if self.labeled is None else "unlabeled_index")
            examples = getattr(self.method.config, "num_examples", None)
            if numbers is not None and examples is not None:
                check_rows(numbers, examples, self.train_source)
        held = {key: inputs[key] for key in self.method.host_inputs if key in inputs}
        moved = super()._prepare_inputs({key: value for key, value in inputs.items() if key not in held})
        prepared = self.views.prepare(moved) | {key: np.asarray(value) for key, value in held.items()}
        return {key.removeprefix("_"): value for key, value in prepared.items()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs, return_dict=True)
        self.last_embeddings = outputs.embeddings.detach()
        self.last_metrics = outputs.metrics or {}
        self.last_loss = outputs.loss.detach()
        self.nonfinite.note_loss(outputs.loss)
        self.note(self.last_metrics)
        self._images += len(inputs[self.method.main_input_name]) + len(inputs.get("unlabeled_index", ()))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def note(self, metrics: dict[str, Tensor] | dict[str, float]) -> None:
        """Add metrics to the current logging window; they are averaged over its micro-batches and over ranks."""
        for name, value in metrics.items():
            total, count = self._window.get(name, (0.0, 0))
            self._window[name] = (total + value, count + 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.nothing_left and "train_runtime" in logs:
            return  # no step was trained: its speed and loss would be zeros among the run's own
        if "loss" in logs and self._window:
            logs.update(self.method.log_metrics(self._window_means()))
            now = time.perf_counter()
            logs["images_per_second"] = self._images * self.args.world_size / max(now - self._clock, 1e-9)
            if self.ledger.skipped:
                logs["skipped_images"] = self.ledger.skipped
            self._window, self._images, self._clock = {}, 0, now
        vectors = {name: value for name, value in logs.items() if isinstance(value, list)}
        with untouched():  # a tracker is code from elsewhere
            super().log({name: value for name, value in logs.items() if name not in vectors}, start_time)
        self.state.log_history[-1].update(vectors)  # kept for the report; trackers and the console take numbers only

    def _window_means(self) -> dict[str, Any]:
        """Each noted metric's mean over the logging window and ranks: a number, or a list where it is a vector."""
        means = [torch.as_tensor(total).float().cpu() / count for total, count in self._window.values()]
        flat = distributed.all_mean(torch.cat([mean.flatten() for mean in means]).to(self.args.device)).cpu()
        parts = flat.split([mean.numel() for mean in means])
        return {name: part.view(mean.shape).tolist() for name, mean, part in zip(self._window, means, parts)}

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.nonfinite.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.nonfinite.grad_norm

    # --- optimiser ------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return sorted(decay_names(model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        args = self.args
        if self.optimizer is None and args.own_optimiser:
            self.optimizer_cls_and_kwargs = own_optimiser(args.own_optimiser, args.learning_rate, args.momentum)
        optimizer = super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        names = decay_names(trained)
        decayed = [parameter for name, parameter in trained.named_parameters() if name in names]
        mark_groups(optimizer, decayed, self.method.constant_rate_parameters(), self.method.learning_rates())
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        args, shape = self.args, self.args.own_schedule
        if self.lr_scheduler is None and shape is not None:
            steps = max(num_training_steps, 1)
            end, warmup = args.min_learning_rate / (args.learning_rate or 1.0), args.get_warmup_steps(steps) / steps
            followed: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                followed, lambda step: shape(step / steps, 1.0, end, warmup)
            )
            self._created_lr_scheduler = True
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        hold_constant_rates(scheduler)
        return scheduler

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What suits the method: see ``measure`` in ``training.kinds``; every key starts with ``metric_key_prefix``.

        eval_dataset: other images than the trainer's, or a dict of them; the key of one of the trainer's.
        """
        queries = self._queries(eval_dataset)
        if isinstance(queries, dict):
            named = ((f"{metric_key_prefix}_{name}", source) for name, source in queries.items())
            return {key: value for prefix, part in named for key, value in self.evaluate(part, None, prefix).items()}
        if self.is_in_train:
            self.nonfinite.check_weights("at an evaluation")
        method: Any = self.whole_method()  # None on all processes but the first
        bank, limit = self._bank(queries), self.args.eval_images or None
        options = {"device": self.args.device, "progress": False, "max_images": limit}
        with untouched(method or self.method):
            measured = distributed.from_first(lambda: self.kind.measure(method, self.views, bank, queries, options))
        if "student_accuracy" in measured and not for_testing(queries) and not self.trained_queries:
            self.method.validate_weights(measured["accuracy"], measured["student_accuracy"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _queries(self, given: Any) -> Any:
        if isinstance(given, str) and isinstance(self.eval_queries, dict) and given in self.eval_queries:
            given = self.eval_queries[given]
        found = self.eval_queries if given is None else measured_images(given, self.train_source)
        if found is None:
            raise ValueError("evaluate() needs labelled images: pass eval_dataset to SSLTrainer, or to evaluate()")
        return found

    def _bank(self, queries: ImageSource) -> ImageSource:
        """The images that vote, where the method is measured by kNN."""
        bank = self.train_source if self.eval_bank is None else self.eval_bank
        if not self.kind.has_bank:
            return bank
        for source, name in ((queries, "eval_dataset"), (bank, "eval_bank")):
            if not source.labels:
                raise ValueError(
                    f"evaluate() measures kNN, and {source.name} (split {source.split}) has no labels: give {name} "
                    "images with labels, or name their column: load_source(..., label_column=...)"
                )
        return bank if self.eval_bank is not None else self._others(queries)

    def _others(self, queries: ImageSource) -> ImageSource:
        """The training images that are not among ``queries``; a picture does not vote for itself."""
        if self._voting is None or self._voting[0] is not queries:
            try:
                self._voting = queries, without(self.train_source, queries)
            except SourceError as error:
                raise ValueError(
                    f"evaluate() measures kNN, and all pictures of {self.train_source.name} are measured on, so none "
                    "is left to vote: give other images as eval_dataset, or some as eval_bank"
                ) from error
        return self._voting[1]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "SSLTrainer predicts nothing: hf_ssl.evaluation.extract_features gives features, and predict a "
            "classifier's probabilities, of any native model and of trainer.model.export_backbone"
        )

    def whole_method(self) -> SSLModel | None:
        """The method with all of its weights on the first process, None on the others. Every process must call it."""
        if not self.is_fsdp_enabled:
            return self.method if self.args.process_index == 0 else None
        state = self.accelerator.get_state_dict(self.model)
        if self.args.process_index != 0:
            return None
        with untouched():
            whole = type(self.method)(self.method.config)
        whole.load_state_dict(state)
        return whole

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        with lock(str(self.args.output_dir), enabled=self.is_world_process_zero()):
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs: Any) -> Any:
        checkpoint = self._choose_checkpoint(resume_from_checkpoint)
        if checkpoint and (ledger := Path(checkpoint, _LEDGER_FILE)).is_file():
            self.ledger.load_state_dict(read_json(ledger))
        self._settle_precision(checkpoint)
        self._settle_facts(checkpoint)
        self._agree_on_labels(checkpoint)
        if self.args.process_index == 0 and (said := nothing_to_learn(self.train_source)):
            logger.warning("%s", said)
        self._images, self._clock = 0, time.perf_counter()
        self.nonfinite.checkpoint = Path(checkpoint) if checkpoint else None
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            self.nonfinite.check_weights("at the end")
        except WaitEnded:  # by a signal; the checkpoint is written
            output = None
        except RuntimeError as error:
            if not process_lost(error):
                raise
            raise ProcessLost(
                f"another process of this run has ended or does not answer, so process {self.args.process_index} of "
                f"{self.args.world_size} stops at step {self.state.global_step}"
            ) from error
        finally:
            self.stopper.restore()
            # Now, not at garbage collection: that closes queues before it stops the workers, which then wait in vain.
            if self._loader is not None:
                self._loader.batches.close()
        if self.stopper.error is not None:
            raise self.stopper.error
        if self.stopper.stopped == signal.SIGINT:
            raise KeyboardInterrupt
        return output

    def replay(self, folder: str | Path) -> dict[str, Any]:
        """Repeat the step that was not finite, from what a stopped run left in ``folder``; nothing is written.

        The trainer must be built as that run's was, from the same seed. Returns reproduced, the step, values (its
        losses, then its gradient norm), module (the first whose output was not finite, or None), weights (names of
        those that were not finite after it) and rows (of each micro-batch of this process, the row numbers).
        """
        return replay(self, folder)

    def save_checkpoint(self) -> None:
        """A checkpoint of the current step, as training makes them; every process must call it."""
        self._save_checkpoint(self.model_wrapped, trial=None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        self.nonfinite.check_weights("at a save")
        try:
            with untouched():
                super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search(r"StreamWriter|inline_container|write", str(error)):
                raise
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            last = last_complete_checkpoint(str(self.args.output_dir))
            kept = f"The last good checkpoint is {last}." if last else "There is no earlier checkpoint."
            again = (
                "then run the same command with --resume_from_checkpoint true"
                if last
                else "then begin again: the same command with --overwrite"
            )
            raise CheckpointError(
                f"cannot write the checkpoint {folder}: {error}. {kept} Free some space or choose another "
                f"--output_dir, {again}."
            ) from error
        self.nonfinite.checkpoint = folder

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(str(output_dir or self.args.output_dir))
        if self.args.should_save:
            with contextlib.suppress(FileNotFoundError):
                os.remove(folder / "training_args.bin")  # a pickle; the same facts as text, tokens masked
            said = scrub(json.loads(self.args.to_json_string()))
            if self.precision is not None:
                said |= precision.to_dict(self.method, self.precision)
            (folder / "training_args.json").write_text(json.dumps(said, indent=2))
            (folder / _LEDGER_FILE).write_text(json.dumps(self.ledger.state_dict()))
            if self.labeled is not None:
                (folder / _LABELED_FILE).write_text(json.dumps(self.labeled.rows.to_dict()))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        wrong = [*load_result.missing_keys, *load_result.unexpected_keys]
        if wrong:  # Trainer warns and goes on with random weights
            raise ValueError(f"the checkpoint does not fit the model: {len(wrong)} weights differ, such as {wrong[0]}")

    def _agree_on_labels(self, checkpoint: Any) -> None:
        """One labelled subset for all ranks and for a run and what it resumes; another one would leak labels."""
        if self.labeled is None:
            return
        mine = self.labeled.rows
        everyone = [mine.to_dict()] * distributed.world_size()
        if len(everyone) > 1:
            dist.all_gather_object(everyone, mine.to_dict())
        if checkpoint and (saved := Path(str(checkpoint), _LABELED_FILE)).is_file():
            everyone.append(read_json(saved))
        for other in everyone:
            mine.check_same(LabeledRows.from_dict(other))

    def skipped_images(self) -> dict[str, Any]:
        """{"count": images left out by all ranks, "names": "file or row: reason"}. Every rank must call it."""
        merged = self.merged_ledger()
        if self.args.process_index == 0:
            self.ledger.update([name for name in merged.names if name not in self.ledger.names], 0)
        return {"count": merged.distinct, "names": merged.names}

    def merged_ledger(self) -> BadImageLedger:
        """The ledger of all ranks; a collective call."""
        mine = self.ledger.state_dict()
        states = [mine] * distributed.world_size()
        if len(states) > 1:
            dist.all_gather_object(states, mine)
        return BadImageLedger.merged(states, self.ledger.total)
