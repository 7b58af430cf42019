"""Every joint-embedding method trains 30 steps of its emoji recipe through the code of ``hf-ssl train``."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ssl.cli.pictures import load_pictures
from hf_ssl.cli.plan import plan_training
from hf_ssl.cli.train import build_trainer
from hf_ssl.methods import METHODS

FAMILY = [name for name, (module, _) in METHODS.items() if ".joint_embedding." in module]
STEPS = 30
FEW = {  # what makes a step cheap and a run short; nothing of the method
    "dataset": "emoji", "max_steps": STEPS, "dataloader_num_workers": 0, "eval_strategy": "no", "save_strategy": "no",
    "logging_steps": 5, "disable_tqdm": "true", "report_to": "none",
}  # fmt: skip
BATCH = {"w_mse": 128}  # whitens sub-batches of as many
BATCH_OF_OTHERS = 32


@pytest.mark.parametrize("name", FAMILY)
def test_thirty_steps_of_the_default_recipe(name: str, tmp_path: Path) -> None:
    """The loss stays finite, and every weight of the backbone that trains has moved."""
    flags: dict[str, Any] = {**FEW, "per_device_train_batch_size": BATCH.get(name, BATCH_OF_OTHERS)}
    flags["output_dir"] = tmp_path / "run"
    plan = plan_training([name, *(str(word) for item in flags.items() for word in (f"--{item[0]}", item[1]))])
    assert plan.recipe is not None and plan.recipe.name == f"{name}_emoji.yaml"
    trainer = build_trainer(plan, load_pictures(plan))
    before = {key: value.clone() for key, value in trainer.method.backbone.named_parameters()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == STEPS // 5 and torch.tensor(losses).isfinite().all()
    assert trainer.method.step == STEPS
    still = [k for k, v in trainer.method.backbone.named_parameters() if v.requires_grad and torch.equal(v, before[k])]
    assert not still, f"30 steps left {still} as they were"
