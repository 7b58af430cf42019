"""Images known by their numbers come with the right ones: map-style, streamed, resumed, broken, on two ranks."""

import dataclasses
import io
import os
import tempfile

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import ResNetConfig

from hf_ssl import SSLTrainer, SSLTrainingArguments
from hf_ssl.cli.plan import plan_training
from hf_ssl.data import load_source
from hf_ssl.data.sources import ImageSource
from hf_ssl.methods.joint_embedding.instdisc import InstDiscConfig, InstDiscForPreTraining, InstDiscImageProcessor
from hf_ssl.training.arguments import ModelArguments
from hf_ssl.training.build import build_method
from tests.invariants.ranks import run_on_ranks

from .conftest import BACKBONE
from .test_resume import final_state

ROWS = 48


def encoded(row: int) -> dict:
    """A picture of one colour that says its row."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (5 * row, 0, 255 - 5 * row)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def numbered(broken: int | None = None) -> ImageSource:
    contents = [{"bytes": b"", "path": None} if row == broken else encoded(row) for row in range(ROWS)]
    return ImageSource("colours", Dataset.from_dict({"image": contents}))


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> ImageSource:
    folder = tmp_path_factory.mktemp("colours")
    for shard in range(3):
        numbered().dataset.select(range(16 * shard, 16 * shard + 16)).to_parquet(str(folder / f"{shard}.parquet"))
    return load_source(str(folder / "*.parquet"), streaming=True)


def make(source: ImageSource, folder, examples: int = ROWS, plain: bool = False, **arguments) -> SSLTrainer:
    torch.manual_seed(0)
    config = InstDiscConfig(
        backbone_config=ResNetConfig(**BACKBONE), num_examples=examples, projection_dim=8, nce_negatives=6
    )
    defaults = {
        "per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 0.05, "save_steps": 3, "logging_steps": 3,
        "optim": "sgd_momentum", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    fields = {"scale": None, "hflip": 0, "jitter_p": 0, "grayscale_p": 0} if plain else {}
    processor = InstDiscImageProcessor(size=16, **fields)
    args = SSLTrainingArguments(str(folder), **{**defaults, **arguments})
    return SSLTrainer(InstDiscForPreTraining(config), args, source, processor)


@pytest.mark.parametrize(("kind", "workers"), [("map", 0), ("map", 2), ("stream", 0), ("stream", 2)])
def test_every_picture_comes_with_its_own_number(tmp_path, streamed, kind, workers) -> None:
    trainer = make(numbered() if kind == "map" else streamed, tmp_path, plain=True, dataloader_num_workers=workers)
    seen: list[int] = []
    batches = iter(trainer.get_train_dataloader())
    for _ in range(6):
        inputs = trainer._prepare_inputs(next(batches))
        assert set(inputs) == {"pixel_values", "index"} and inputs["index"].dtype == torch.int64
        red = trainer.views.undo(inputs["pixel_values"])[:, 0, 0, 0, 0]
        assert (red // 5).tolist() == inputs["index"].tolist()
        seen += inputs["index"].tolist()
    if (kind, workers) != ("stream", 2):  # there a worker with a shard less is in its next epoch
        assert sorted(seen) == list(range(ROWS)) and seen != sorted(seen)


def test_an_epoch_updates_every_row_once(tmp_path) -> None:
    trainer = make(numbered(), tmp_path)
    start = trainer.method.bank.rows.clone()
    trainer.train()
    moved = (trainer.method.bank.rows != start).any(1)
    assert moved.all() and torch.allclose(trainer.method.bank.rows.norm(dim=1), torch.ones(ROWS))
    assert trainer.method.partition > 0 and "instance_accuracy" in trainer.state.log_history[0]


@pytest.mark.parametrize(("kind", "workers"), [("map", 2), ("stream", 2)])
def test_resumed_is_bit_equal_bank_included(tmp_path, streamed, kind, workers) -> None:
    source = numbered() if kind == "map" else streamed
    whole = make(source, tmp_path, max_steps=10, dataloader_num_workers=workers)
    whole.train()
    resumed = make(source, tmp_path, max_steps=10, dataloader_num_workers=workers)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again = final_state(resumed)
    for name, value in final_state(whole).items():
        assert torch.equal(value, again[name]), name


def test_a_broken_picture_leaves_its_row_alone(tmp_path) -> None:
    """Another picture of the batch stands in for it, under that picture's own number."""
    trainer = make(numbered(broken=11), tmp_path, max_bad_fraction=0.1)
    start = trainer.method.bank.rows.clone()
    trainer.train()
    moved = (trainer.method.bank.rows != start).any(1)
    assert (~moved).nonzero().flatten().tolist() == [11]


def two_ranks(name: str) -> dict[str, torch.Tensor]:
    """Two steps of 8 images, on however many ranks there are."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world > 1:
        rank = str(torch.distributed.get_rank())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(world))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(
            numbered(), folder, max_steps=2, save_strategy="no", per_device_train_batch_size=8 // world, optim="sgd"
        )
        assert trainer.args.world_size == world
        trainer.train()
    return {key: trainer.method.state_dict()[key] for key in ("bank.rows", "partition", "projector.weight", "step")}


def test_two_ranks_fill_one_bank(tmp_path) -> None:
    alone = two_ranks("alone")
    for found in run_on_ranks(two_ranks, ["bank"], tmp_path)["bank"]:
        assert not isinstance(found, str), found
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: key + text)
    assert (alone["bank.rows"].norm(dim=1) - 1).abs().lt(1e-5).sum() == 16  # the 16 images of two steps


def test_a_number_beyond_the_bank_is_refused_in_words(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"colours has a row \d+ .* num_examples=20 training images: give --num_ex"):
        make(numbered(), tmp_path, examples=20).train()


def test_who_counts_the_images(tmp_path, streamed) -> None:
    """The source, or the flag where a stream does not say; rows of shards without lengths have no numbers."""
    small = ModelArguments(backbone="resnet-pico", image_size=32)

    def built(source: ImageSource, **fields) -> int | None:
        return build_method("instdisc", source, small, fields)[0].config.num_examples

    assert built(numbered()) == built(streamed) == ROWS
    for shard in range(2):
        numbered().dataset.to_parquet(str(tmp_path / f"{shard}.parquet"))
    one, two = (ImageSource("stream", numbered().dataset.to_iterable_dataset(num_shards=shards)) for shards in (1, 2))
    with pytest.raises(ValueError, match="does not say how many there are: give --num_examples"):
        built(dataclasses.replace(one))
    assert built(one, num_examples=60) == 60
    with pytest.raises(ValueError, match="a stream of 2 shards of unknown length does not number its rows"):
        built(two, num_examples=60)
    plan = plan_training(["instdisc", "--dataset", "emoji", "--num_examples", "500", "--output_dir", str(tmp_path)])
    assert plan.group("method")["num_examples"] == 500
