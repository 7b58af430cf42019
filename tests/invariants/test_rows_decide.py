"""What is drawn for a row depends on seed, epoch and row number alone: one process ≡ two ≡ micro-batches, in the data.

With what the data layer hands out a training pass draws nothing more: `test_one_is_many` has one answer to find.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_ssl.data.collator import build_dataloader
from hf_ssl.training import SSLTrainer, SSLTrainingArguments
from tests.contract.tiny import TINY, batch, build, processor
from tests.invariants.test_trainer_accumulates import source

OF_PICTURES = sorted(name for name in TINY if not TINY[name].classes and name != "clip")


def loaded(name: str, size: int, rank: int = 0, world: int = 1, start: int = 0) -> dict[str, Any]:
    """The first batch of the run, or number ``start``, of what the trainer's loader makes."""
    draw = build(name).row_inputs()
    batches = build_dataloader(
        source(), processor(name), size, rank, world, seed=3, start_batch=start, keep_columns=("_index",),
        row_inputs=draw,
    )  # fmt: skip
    return next(iter(batches))


@pytest.mark.parametrize("name", OF_PICTURES)
def test_two_processes_load_what_one_does(name: str) -> None:
    whole = loaded(name, 16)
    parts = [loaded(name, 8, rank, 2) for rank in range(2)]
    assert whole.keys() == parts[0].keys()
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([part[key] for part in parts])), key


@pytest.mark.parametrize("name", ["mae", "dinov2", "dinov3"])
def test_a_rows_mask_is_its_own_and_its_epochs(name: str) -> None:
    """No two rows of a batch share a mask, an epoch brings others, a resumed run the same."""
    key = "noise" if name == "mae" else "masks"
    assert name == "mae" or key in build(name).host_inputs  # it must reach ``forward`` without a wait for the device
    first = loaded(name, 16)
    assert first[key].flatten(1).unique(dim=0).shape[0] > 14
    later = loaded(name, 16, start=2)  # 32 rows: the second epoch
    order = [first["_index"].tolist().index(row) for row in later["_index"].tolist() if row in first["_index"]]
    again = [row in first["_index"] for row in later["_index"]]
    assert sum(again) > 2 and not torch.equal(later[key][again], first[key][order])
    assert torch.equal(loaded(name, 16, start=2)[key], later[key])


def generators() -> tuple[Any, ...]:
    numbers = np.random.get_state()
    return torch.get_rng_state().tolist(), numbers[1].tolist(), numbers[2], random.getstate()


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_training_pass_draws_nothing_more(name: str) -> None:
    """Fails for a method that draws in ``forward``: its ranks and micro-batches would each draw for themselves."""
    model, views = build(name), batch(name, 8)
    before = generators()
    model(**views).loss.backward()
    model.before_optimizer_step(0.5)
    model.after_optimizer_step(0.5)
    assert generators() == before


def trained(name: str, folder: Path, size: int, accumulation: int) -> dict[str, Tensor]:
    model = build(name)
    args = SSLTrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=size, learning_rate=1e-2, warmup_steps=0,
        gradient_accumulation_steps=accumulation, optim="sgd", max_grad_norm=0.0, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    SSLTrainer(model=model, args=args, train_source=source(), processing_class=processor(name)).train()
    return model.state_dict()


def test_the_trainer_masks_micro_batches_as_it_masks_the_batch(tmp_path: Path) -> None:
    whole, parts = trained("mae", tmp_path / "whole", 8, 1), trained("mae", tmp_path / "parts", 4, 2)
    start = build("mae").state_dict()
    assert not torch.equal(whole["decoder.predict.weight"], start["decoder.predict.weight"])
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_the_trainer_gives_masks_of_the_rows(tmp_path: Path) -> None:
    """Another state of torch's generator changes nothing: DINOv2's run follows from its data's seed."""
    torch.manual_seed(1)
    one = trained("dinov2", tmp_path / "one", 8, 1)
    seen = SSLTrainer.compute_loss

    def disturbed(self: SSLTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        assert isinstance(inputs["masks"], np.ndarray)
        torch.rand(7)  # as an evaluation between two steps might
        return seen(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SSLTrainer, "compute_loss", disturbed)
        other = trained("dinov2", tmp_path / "other", 8, 1)
    for key, value in one.items():
        assert torch.equal(other[key], value), key
