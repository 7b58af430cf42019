"""A tiny method on a few real pictures, and child processes that are forked (imports are paid once)."""

import dataclasses
import multiprocessing
from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig

from hf_ssl import SimCLRConfig, SimCLRForPreTraining, SimCLRImageProcessor, SSLTrainer, SSLTrainingArguments
from hf_ssl.data import load_source
from tests import PATIENCE

BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # forked children must not inherit a thread pool


@pytest.fixture(scope="session")
def pictures():
    """96 emoji, map-style."""
    source = load_source("emoji")
    return dataclasses.replace(source, dataset=source.dataset.select(range(96)))


@pytest.fixture(scope="session")
def shards(tmp_path_factory, pictures):
    """The same pictures as four parquet files."""
    folder = tmp_path_factory.mktemp("shards")
    for i in range(4):
        pictures.dataset.shard(4, i).to_parquet(str(folder / f"part-{i}.parquet"))
    return str(folder / "*.parquet")


def make_trainer(source, folder: Path, **arguments) -> SSLTrainer:
    torch.manual_seed(0)
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=ResNetConfig(**BACKBONE), projection_dim=8))
    defaults = {
        "per_device_train_batch_size": 16, "num_train_epochs": 2, "learning_rate": 0.05, "save_steps": 2,
        "logging_steps": 3, "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    args = SSLTrainingArguments(str(folder), **{**defaults, **arguments})
    processor = SimCLRImageProcessor(size={"height": 16, "width": 16}, blur_p=0.0)
    return SSLTrainer(model, args, source, processor)


def in_child(function) -> int:
    """Run ``function`` in a forked process; its exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None, f"the child did not end within {PATIENCE} s"
    return process.exitcode
