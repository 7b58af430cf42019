"""What a trainer knows of its run, and how it publishes: the one layout at every save and at the end."""

import json
import logging
import os
import platform
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..files import whole_file
from ..hub import ParityError, check_parity, draw_pictures, export, write_card
from ..hub.errors import PublishError
from ..hub.folder import publishable
from ..hub.pictures import may_show
from ..hub.publish import card_for, create_repo, push_command, upload
from ..methods import name_of
from ..modeling import SSLModel
from ..untouched import untouched
from . import precision
from .inputs import each

logger = logging.getLogger("hf_ssl.training")


class PublishingTrainer(Trainer):
    """A Trainer whose pushes are published repos: the native model in the root, the method in ``ssl/``, one commit.

    At a save the folder is written and checked between two steps and uploaded in the background; a push that fails
    is logged, and the next one repeats it. ``push_to_hub`` waits and raises PublishError. With
    ``hub_strategy`` checkpoint or all_checkpoints the same commit also holds the checkpoint to resume from.
    """

    card_facts: dict[str, Any]  # what the card says beside what the trainer knows, as in run.json; it comes first
    _worker: ThreadPoolExecutor | None = None
    _push: "Future[Any] | None" = None

    def run_record(self) -> dict[str, Any]:
        """What the card tells of the run, with the names of run.json."""
        args, source, start = self.args, self.train_source, self.method.backbone.config.name_or_path
        ran = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
        return {
            "method": name_of(self.method.config.model_type),
            "dataset": source.name,
            "split": source.split,
            "num_images": source.num_rows,
            "images_per_step": self.images_per_step,
            "steps": self.state.global_step,
            "time_seconds": sum(ran),
            "seed": args.seed,
            "environment": environment(args.world_size),
            "division": self._division(),
            "labeled": None if self.labeled is None else self.labeled.rows.to_dict(),
            "init": {"from_pretrained": start or None, "seed": args.seed},
            **self.precision_facts(),
            **published_facts(self.method),
            **self.card_facts,
        }

    def _division(self) -> dict[str, Any]:
        """How many rows train and how many are measured on, as far as the trainer was told."""
        counts = [source.num_rows for source in each(self.eval_queries)]
        known = [count for count in counts if count is not None]
        queries = sum(known) if known and len(known) == len(counts) else None
        return {"train": self.train_source.num_rows, "measured": queries, "trained_on": self.trained_queries}

    def precision_facts(self) -> dict[str, Any]:
        """precision and attn_implementation, which repeat the run where they are stated, and precision_reason."""
        choice = getattr(self, "precision", None)
        if choice is None:  # before training starts
            return {}
        return {**precision.to_dict(self.method, choice), "precision_reason": choice.said}

    @property
    def images_per_step(self) -> int:
        """Images of one optimiser step, over ranks and accumulation; a semi-supervised one's unlabelled as well."""
        args = self.args
        images = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return images if self.labeled is None else images * (1 + self.labeled.unlabeled_ratio)

    # --- Trainer's hooks ------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if not self.is_world_process_zero():
            return
        args = self.args
        name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
        private = args.hub_private_repo if private is None else private
        self.hub_model_id = create_repo(name, token or args.hub_token, private)
        self.push_in_progress = None

    @untouched()
    def create_model_card(self, **facts: Any) -> None:
        """README.md of the output folder; ``facts`` as ``card_facts``."""
        method = self.whole_method()
        if method is not None:
            write_card(method, str(self.args.output_dir), {**self.run_record(), **facts}, self.hub_model_id)

    @untouched()
    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts: Any,
    ) -> Any:
        """Write the output folder as published repos are, check it, and upload it in one commit.

        facts: for the card, as ``card_facts`` (license="mit", tags=[...], results=[...]). Returns the CommitInfo, a
        future of it without ``blocking``, None on other processes than the first. Raises PublishError.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        method = self.whole_method()
        if method is None:
            return None
        folder, run = Path(str(self.args.output_dir)), {**self.run_record(), **facts}
        export(method, self.views, folder, run)
        check_parity(folder, method, self.views)
        if not (folder / "run.json").is_file():
            with whole_file(folder / "run.json") as file:
                file.write_text(json.dumps(run, indent=2, default=str))
        if may_show(run):
            draw_pictures(folder)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()
        token = token or self.args.hub_token
        card = card_for(folder, method, str(self.hub_model_id), run, token)
        options: dict[str, Any] = {"token": token, "revision": revision or self.args.hub_revision}
        options["message"] = commit_message or "End of training"
        options["again"] = push_command(folder, str(self.hub_model_id))
        self._push = self._pool().submit(upload, folder, card, str(self.hub_model_id), **options)
        return self._push.result() if blocking else self._push

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        if args.hub_strategy == HubStrategy.END:
            return
        method = self.whole_method()  # every process: FSDP gathers the weights
        busy = self._push is not None and not self._push.done()
        if method is None or (busy and not args.hub_always_push):
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        output = Path(str(args.output_dir))
        if not busy:
            for left in output.glob(".publish-*"):  # by a run that was killed while it uploaded
                shutil.rmtree(left, ignore_errors=True)
        folder = output / f".publish-{self.state.global_step}"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            run = self.run_record()
            export(method, self.views, folder, run)
            check_parity(folder, method, self.views)
            card = card_for(folder, method, str(self.hub_model_id), run, args.hub_token)
            extra = self.checkpoint_copy(Path(checkpoint_folder), folder)
        except (OSError, SafetensorError, ParityError) as error:  # a full disk, say: the checkpoint itself is safe
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("Step %d is not published: %s. Training goes on.", self.state.global_step, error)
            return
        message = f"Training in progress, step {self.state.global_step}"
        self._push = self._pool().submit(self._upload, folder, card, message, extra)

    def checkpoint_copy(self, checkpoint: Path, folder: Path) -> dict[str, Path]:
        """What to resume from, where the strategy publishes it, linked."""
        strategy = self.args.hub_strategy
        if strategy not in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            return {}
        name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
        copies, target = {}, folder / "resume"
        for file in (file for file in checkpoint.rglob("*") if file.is_file()):
            copy = target / file.relative_to(checkpoint)
            copy.parent.mkdir(parents=True, exist_ok=True)
            content = publishable(file)
            if isinstance(content, bytes):
                copy.write_bytes(content)
            else:
                link(file, copy)  # the checkpoint may be rotated away while this uploads
            copies[f"{name}/{file.relative_to(checkpoint).as_posix()}"] = copy
        return copies

    def _upload(self, folder: Path, card: Any, message: str, extra: dict[str, Path]) -> Any:
        args = self.args
        try:
            return upload(
                folder, card, str(self.hub_model_id),
                token=args.hub_token, revision=args.hub_revision, message=message, extra=extra,
            )  # fmt: skip
        except PublishError as error:
            logger.warning("%s: %s Training goes on; the next save pushes again.", message, error)
            return None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _finish_current_push(self) -> None:
        if self._push is not None and not self._push.done():
            logger.info("Waiting for the upload of the last checkpoint.")
            self._push.exception()

    def _pool(self) -> ThreadPoolExecutor:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "hf_ssl-upload")  # one: commits follow each other
        return self._worker


def link(file: str | Path, copy: str | Path) -> None:
    """A second name for ``file``, or a copy where the file system has no links."""
    try:
        os.link(file, copy)
    except OSError:  # another disk, or one that knows no links
        shutil.copy2(file, copy)


def published_facts(method: SSLModel) -> dict[str, Any]:
    """Which weights are published and why, where a method has an average beside the last ones."""
    weights, why = method.chosen_weights()
    return {} if method.average is None else {"published": {"weights": weights, "why": why}}


def environment(world_size: int = 1) -> dict[str, Any]:
    """Versions and machine, as run.json keeps them; nothing that names the machine or its user."""
    from .. import __version__

    packages = ("torch", "torchvision", "transformers", "datasets", "accelerate")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "hf_ssl": __version__,
        "python": sys.version.split()[0],
        **{name: metadata.version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": cores,
        "torch_threads": torch.get_num_threads(),
        "gpus": ", ".join(gpus) or "none",
        "processes": world_size,
    }
