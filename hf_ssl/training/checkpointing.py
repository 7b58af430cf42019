"""A trainer's side of its checkpoints: each is listed file by file, and a run goes on from a whole and fitting one."""

import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers.trainer_utils import rotate_checkpoints

from .. import distributed
from ..documents import read_json
from . import checkpoints, manifest
from .optim import take_settings
from .publish import PublishingTrainer

if TYPE_CHECKING:
    from .trainer import SSLTrainer

logger = logging.getLogger("hf_ssl.training")


class CheckpointingTrainer(PublishingTrainer):
    """A Trainer whose checkpoints list their files and settings (``manifest.json``), and which resumes only from one
    that is whole and was trained with the same settings. Every process must call its methods."""

    facts: manifest.Facts | None = None  # what the numbers of this run depend on; settled when training starts
    nothing_left = False  # whether the run was resumed at its last step

    _anew: bool = False  # whether the optimiser's state is not the checkpoint's
    _retake: bool = False  # whether the optimiser's settings or the schedule are not the checkpoint's

    def _choose_checkpoint(self, asked: str | bool | None) -> str | None:
        """The checkpoint to go on from, None where none was asked for. ValueError: there is none that is whole."""
        if not asked:
            return None
        output, named = str(self.args.output_dir), None if asked is True else str(asked)
        return distributed.from_first(lambda: _choose(output, named))

    def _settle_facts(self, checkpoint: str | None) -> None:
        """What this run's numbers depend on, held against ``checkpoint``'s. ValueError where they must not differ."""
        self.nothing_left = self._anew = self._retake = False
        self.facts = facts = manifest.facts(cast("SSLTrainer", self))
        allowed = cast("SSLTrainer", self).args.allowed_changes
        if checkpoint is None:
            return
        misfit = _misfit(checkpoint, cast("SSLTrainer", self).method)
        differences = distributed.from_first(lambda: _compared(checkpoint, facts, allowed, misfit))
        for line in differences.told:
            self._tell(line)
        changed = set(differences.allowed)
        self._anew, self._retake = "optim" in changed, bool(changed)

    def _tell(self, line: str) -> None:
        if distributed.rank() == 0:
            logger.warning("%s", line)

    # --- going on -------------------------------------------------------------------------------------------------

    def _init_training_state(  # type: ignore[override]
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        begun = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        if checkpoint is None:
            return begun
        self.state.compute_steps(self.args, max_steps)  # else logs, saves and evaluations keep the old intervals
        step, planned = self.state.global_step, _planned(checkpoint)
        if step > max_steps:
            raise ValueError(
                f"{checkpoint} stands at step {step:,} and the run has {max_steps:,} steps: raise --max_steps (or "
                "--num_train_epochs), or name an earlier checkpoint"
            )
        if step == max_steps:
            self.nothing_left = True
            self._tell(f"Nothing is left to train: {Path(checkpoint).name} stands at the last of {max_steps:,} steps.")
            return epochs, 0
        if planned not in (None, max_steps):
            self._retake = True
            self._tell(
                f"The run has {max_steps:,} steps, and {planned:,} when {Path(checkpoint).name} was written: learning "
                "rate and other schedules follow the new length from here on, so this is not bit for bit the run that "
                "had it from the start."
            )
        return begun

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:  # load_state_dict's: a weight has another shape
            raise ValueError(_unfit(resume_from_checkpoint, "weights do not fit this model", error)) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        if self._anew:
            assert self.lr_scheduler is not None
            state = torch.load(Path(checkpoint, "scheduler.pt"), map_location="cpu", weights_only=True)
            self.lr_scheduler.load_state_dict(state)
            self._tell("The optimiser is another one: it starts without the state of the earlier one.")
        else:
            try:
                super()._load_optimizer_and_scheduler(checkpoint)
            except (ValueError, KeyError) as error:
                raise ValueError(_unfit(checkpoint, "optimiser's state does not fit this run's", error)) from error
        if self._retake or self._anew:
            take_settings(self.optimizer, self.lr_scheduler, fresh)

    # --- saving ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in Trainer; an older checkpoint is only removed when the new one is whole and says so."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            run = self._get_output_dir(trial)
            self._seal(Path(run, f"checkpoint-{self.state.global_step}"))
            for part in filter(checkpoints.is_remains, checkpoints.checkpoints(run)):
                shutil.rmtree(part, ignore_errors=True)  # it would count, and push out one that is whole
            rotate_checkpoints(run, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save_rng_state(self, output_dir: str) -> None:
        """As in Trainer; no process lists the files before all have written theirs."""
        super()._save_rng_state(output_dir)
        if distributed.world_size() > 1:
            dist.barrier()

    def checkpoint_copy(self, checkpoint: Path, folder: Path) -> dict[str, Path]:
        """As in PublishingTrainer; what is pushed differs by the paths cut from it, so it is listed anew."""
        copies = super().checkpoint_copy(checkpoint, folder)
        if copies:
            self._seal(folder / "resume")
            place = next(iter(copies)).partition("/")[0]
            copies[f"{place}/{checkpoints.MANIFEST}"] = folder / "resume" / checkpoints.MANIFEST
        return copies

    def _seal(self, folder: Path) -> None:
        checkpoints.seal(folder, self.facts or {})


def _choose(output_dir: str, named: str | None) -> str:
    if named is not None:
        checkpoints.require_whole(named)
        return named
    whole, passed = checkpoints.newest_whole(output_dir)
    if whole is None:
        why = f": {', '.join(passed)}" if passed else ""
        raise ValueError(
            f"there is no complete checkpoint in {output_dir} to resume from{why}. To begin again train without "
            "resume_from_checkpoint; on the command line give --overwrite instead of --resume_from_checkpoint"
        )
    for words in passed:
        logger.warning("Passed over: %s. The run goes on from %s.", words, Path(whole).name)
    return whole


def _misfit(checkpoint: str, model: nn.Module) -> str | None:
    """A weight of ``checkpoint`` that ``model`` has in another shape, in words; only the file's header is read."""
    path = Path(checkpoint, "model.safetensors")
    if not path.is_file():
        return None
    own = model.state_dict()
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            there, here = file.get_slice(name).get_shape(), list(own[name].shape) if name in own else None
            if here is not None and there != here:
                return f"{name} has shape {there} in the checkpoint and {here} here"
    return None


def _compared(
    checkpoint: str, facts: manifest.Facts, allowed: tuple[str, ...], misfit: str | None
) -> manifest.Differences:
    kept = checkpoints.read_manifest(checkpoint)
    if kept is None:
        words = (
            f"{Path(checkpoint).name} holds no {checkpoints.MANIFEST}, so whether its settings are this run's and its "
            "files are whole is not known. The run goes on."
        )
        return manifest.Differences(told=[words])
    return manifest.check(checkpoint, kept["facts"], facts, allowed, misfit)


def _planned(checkpoint: str) -> int | None:
    """How many steps the run had when ``checkpoint`` was written."""
    steps: int | None = read_json(Path(checkpoint, "trainer_state.json")).get("max_steps")
    return steps


def _unfit(checkpoint: str, what: str, error: Exception) -> str:
    words = " ".join(str(error).split())
    found = re.search(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", words)
    if found:
        words = f"{found[1]} has shape {found[2]} in the checkpoint and {found[3]} here"
    return (
        f"the run cannot go on from {checkpoint}: its {what} ({words[:300]}). Train with the settings that it was "
        "trained with, or start a new run in another output_dir"
    )
