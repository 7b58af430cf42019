"""What a run's numbers depend on is kept with every checkpoint, and nothing of it changes unnoticed."""

import copy
import dataclasses
import logging
import shutil

import pytest
from datasets import Dataset

from hf_ssl import SimCLRConfig, SSLTrainingArguments, fit
from hf_ssl.cli import main
from hf_ssl.data import load_source
from hf_ssl.methods import METHODS
from hf_ssl.training import manifest
from hf_ssl.training.checkpoints import read_manifest
from tests.contract.tiny import TINY, make_config, processor

from .conftest import make_trainer


def another(value):
    """A value of the same kind that is not ``value``."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, (list, tuple)) and value:
        return type(value)([another(value[0]), *value[1:]])
    if isinstance(value, dict) and value:
        name = next(iter(value))
        return {**value, name: another(value[name])}
    return f"{value}x"


def notices(before, after) -> set[str]:
    return set(manifest.compare({"any": before}, {"any": after}).refused)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_field_of_every_method_is_compared(name):
    """Each field of the config, the backbone's among them, and each attribute and view field of the processor."""
    config, recipe = make_config(name), processor(name)
    fields = {field.name for field in dataclasses.fields(type(config))} - manifest._CONFIG_HARMLESS
    assert len(fields) > 1 and fields <= set(config.to_dict()) | {"backbone_config"}
    kept = manifest.config_facts(config)
    assert {part for part in fields if not any(known.startswith(part) for known in kept)} <= {"backbone_config"}
    assert any(known.startswith("backbone.") for known in kept)
    for known, value in kept.items():
        assert notices(kept, {**kept, known: another(value)}) == {known}
    for part in fields - {"backbone_config"}:
        changed = copy.deepcopy(config)
        changed.__dict__[part] = another(getattr(config, part))
        assert any(known.startswith(part) for known in notices(kept, manifest.config_facts(changed))), part
    kept = manifest.view_facts(recipe)
    for known in recipe.to_dict().keys() - {"image_processor_type", "size"}:
        changed = copy.deepcopy(recipe)
        changed.__dict__[known] = another(getattr(recipe, known))
        assert any(found.startswith(known) for found in notices(kept, manifest.view_facts(changed))), known
    fields = {"size": recipe.size["height"] + 8, **({"tokenizer": recipe.tokenizer} if name == "clip" else {})}
    assert "image_size" in notices(kept, manifest.view_facts(type(recipe)(**{**TINY[name].processor, **fields})))


def test_every_training_argument_is_compared_or_named_as_harmless(tmp_path):
    args = SSLTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], optim="sgd_momentum")
    fields = {field.name for field in dataclasses.fields(args) if field.init}
    kept = manifest.argument_facts(args)
    harmless = {name for name in fields if name.startswith(manifest.HARMLESS)}
    assert set(kept) == fields - harmless - set(manifest._RESOLVED)
    assert {"learning_rate", "weight_decay", "seed", "warmup_steps", "gradient_accumulation_steps"} <= set(kept)
    for name in ("optim", "lr_scheduler_type"):  # both are Trainer's own names by now, whatever was asked for
        other = {"optim": "lars", "lr_scheduler_type": "cosine_7_16"}[name]
        changed = SSLTrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], **{"optim": "sgd_momentum", name: other}
        )
        assert notices(kept, manifest.argument_facts(changed)) == {name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    """A run of six steps with checkpoints at 2, 4 and 6: (folder, trainer)."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(pictures, folder, max_steps=6, warmup_steps=1)
    trainer.train()
    return folder, trainer


def rows(pictures, *numbers):
    return dataclasses.replace(pictures, dataset=pictures.dataset.select(numbers))


CHANGES = {
    "per_device_train_batch_size": ({"per_device_train_batch_size": 8}, "16 in the checkpoint and 8 here"),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, "1 in the checkpoint and 2 here"),
    "seed": ({"seed": 7}, "42 in the checkpoint and 7 here"),
    "learning_rate": ({"learning_rate": 0.5}, "0.05 in the checkpoint and 0.5 here"),
    "optim": ({"optim": "lars"}, '"adamw_torch" in the checkpoint and "lars" here'),
    "precision": ({"precision": "bf16"}, '"fp32" in the checkpoint and "bf16" here'),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_by_name_and_value(trained, pictures, name):
    changed, words = CHANGES[name]
    folder = str(trained[0] / "checkpoint-4")
    with pytest.raises(ValueError, match=f"{name} {words}.*--allow_changed {name}"):
        make_trainer(pictures, trained[0], max_steps=6, **{"warmup_steps": 1, **changed}).train(folder)


@pytest.mark.parametrize("allowed", [None, "projection_dim"])
def test_a_change_that_no_weights_fit_cannot_be_allowed(trained, pictures, allowed, caplog, monkeypatch):
    monkeypatch.setattr(
        "tests.training.conftest.SimCLRConfig", lambda **fields: SimCLRConfig(**{**fields, "projection_dim": 9})
    )
    trainer = make_trainer(pictures, trained[0] / "misfit", max_steps=6, warmup_steps=1, allow_changed=allowed)
    with pytest.raises(ValueError, match="projection_dim 8 in the checkpoint and 9 here") as refused:
        trainer.train(str(trained[0] / "checkpoint-4"))
    assert "has shape [8" in str(refused.value) and "allow_changed" not in str(refused.value)
    assert "as allowed" not in caplog.text


def test_other_images_are_refused_and_a_moved_folder_is_not(trained, pictures):
    def refused(source, words):
        trainer = make_trainer(source, trained[0], max_steps=6, warmup_steps=1)
        with pytest.raises(ValueError, match=words):
            trainer.train(str(trained[0] / "checkpoint-4"))

    refused(rows(pictures, *range(80)), "dataset.rows 96 in the checkpoint and 80 here")
    refused(rows(pictures, *range(95), 0), "hold other images or texts.*--allow_changed dataset")
    refused(dataclasses.replace(pictures, render=load_source("emoji:placed").render), '"place" here')
    moved = dataclasses.replace(pictures, name="/elsewhere/emoji-2")
    trainer = make_trainer(moved, trained[0] / "other", max_steps=5, warmup_steps=1)
    trainer.train(str(trained[0] / "checkpoint-4"))
    assert trainer.state.global_step == 5
    kept = [manifest.source_facts(source)["content"] for source in (pictures, moved)]
    assert kept[0] == kept[1]


def test_a_streams_workers_and_buffer_matter_and_other_sources_do_not_care(tmp_path, pictures, shards):
    def found(source, **arguments):
        trainer = make_trainer(source, tmp_path, **arguments)
        trainer._settle_facts(None)
        return trainer.facts

    workers = {"dataloader_num_workers": 2}
    assert not manifest.compare(found(pictures), found(pictures, **workers)).refused
    stream = load_source(shards, streaming=True)
    assert set(manifest.compare(found(stream), found(stream, **workers)).refused) == {"dataloader_num_workers"}
    before, now = found(pictures), found(pictures)
    now["run"]["world_size"], now["training"]["per_device_train_batch_size"] = 2, 8  # 2 × 8 images are 1 × 16
    changes = manifest.compare(before, now)
    assert not changes.refused and set(changes.sound) == {"world_size", "per_device_train_batch_size"}
    now["training"]["per_device_train_batch_size"] = 16
    assert set(manifest.compare(before, now).refused) == {"world_size"}


def test_an_allowed_change_takes_effect_and_is_told(trained, pictures, caplog):
    """The checkpoint's optimiser would bring its own learning rate and weight decay."""
    folder = str(trained[0] / "checkpoint-4")
    changed = {"learning_rate": 0.5, "weight_decay": 0.25, "warmup_steps": 1, "max_steps": 6}
    trainer = make_trainer(pictures, trained[0] / "allowed", allow_changed="learning-rate, weight_decay", **changed)
    with caplog.at_level(logging.WARNING, logger="hf_ssl.training"):
        trainer.train(folder)
    assert "as allowed: learning_rate 0.05 in the checkpoint and 0.5 here" in caplog.text
    earlier = [group["initial_lr"] for group in trained[1].optimizer.param_groups]
    groups = trainer.optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == pytest.approx([10 * rate for rate in earlier])
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    logged = [[e for e in t.state.log_history if "learning_rate" in e][-1] for t in (trained[1], trainer)]
    assert logged[1]["learning_rate"] == pytest.approx(10 * logged[0]["learning_rate"]) != 0
    other = make_trainer(pictures, trained[0] / "optim", optim="lars", allow_changed=["optim"], max_steps=6,
                         warmup_steps=1)  # fmt: skip
    other.train(folder)
    assert other.state.global_step == 6 and type(other.optimizer.optimizer).__name__ == "LARS"


def test_nothing_is_refused_that_did_not_change(trained, pictures, caplog):
    with pytest.raises(ValueError, match=r"'lerning_rate'.*the nearest is learning_rate"):
        make_trainer(pictures, trained[0], allow_changed="lerning_rate").train(str(trained[0] / "checkpoint-4"))
    harmless = {"logging_steps": 1, "save_steps": 1, "health_steps": 3, "dataloader_num_workers": 1, "run_name": "b"}
    trainer = make_trainer(pictures, trained[0] / "harmless", max_steps=6, warmup_steps=1, **harmless)
    with caplog.at_level(logging.WARNING, logger="hf_ssl.training"):
        trainer.train(str(trained[0] / "checkpoint-4"))
    assert "Changed" not in caplog.text
    for name, value in trained[1].method.state_dict().items():
        assert value.equal(trainer.method.state_dict()[name]), name


def test_a_checkpoint_without_settings_goes_on_with_a_word(trained, pictures, caplog, tmp_path):
    shutil.copytree(trained[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    trainer = make_trainer(pictures, tmp_path, max_steps=6, warmup_steps=1)
    with caplog.at_level(logging.WARNING, logger="hf_ssl.training"):
        trainer.train(True)
    assert "checkpoint-4 holds no manifest.json" in caplog.text
    for name, value in trained[1].method.state_dict().items():
        assert value.equal(trainer.method.state_dict()[name]), name


def test_no_path_and_no_token_is_kept(tmp_path, pictures):
    source = dataclasses.replace(pictures, name="/home/anna/pictures")
    make_trainer(source, tmp_path, max_steps=1, hub_token="hf_ThisMustNeverBeWritten42").train()
    text = (tmp_path / "checkpoint-1" / "manifest.json").read_text()
    assert "anna" not in text and "hf_This" not in text and str(tmp_path) not in text


def test_every_entry_point_compares(tmp_path, pictures, capsys, monkeypatch):
    """The command line and ``fit``; the trainer itself is tried above."""
    bank = Dataset.from_list(
        [{**row, "label": i % 2} for i, row in enumerate(pictures.dataset.select_columns("image").to_list())]
    ).cast_column("image", pictures.dataset.features["image"])
    options = {
        "image_size": 16, "unlabeled_ratio": 1, "max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "output_dir": tmp_path / "fit", "save_steps": 1,
    }  # fmt: skip
    fit("resnet-nano", bank, **options)
    kept = read_manifest(tmp_path / "fit" / "checkpoint-2")["facts"]
    assert kept["method"]["model_type"] == "ssl_fixmatch" and kept["data"]["unlabeled_ratio"] == 1
    with pytest.raises(ValueError, match=r"learning_rate .* in the checkpoint and 0.4 here"):
        fit("resnet-nano", bank, **options, learning_rate=0.4, resume_from_checkpoint=True)

    bank.cast_column("image", load_source("emoji").dataset.features["image"]).to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr("hf_ssl.cli.train.quiet", lambda: None)  # it would silence the tests that follow
    command = ["--dataset", str(tmp_path / "rows.parquet"), "--output_dir", str(tmp_path / "cli"), "--use_cpu",
               "--backbone", "resnet-nano", "--image_size", "16", "--per_device_train_batch_size", "8",
               "--max_steps", "2", "--save_steps", "1", "--no_evaluation", "--no_report", "--report_to", "none",
               ]  # fmt: skip
    assert main(["train", "simclr", *command]) == 0
    again = ["--resume_from_checkpoint", "true"]
    for method, changed, words in [
        ("simclr", ["--temperature", "0.9"], "temperature 0.1 in the checkpoint and 0.9 here"),
        ("simclr", ["--image_size", "24"], "image_size 16 in the checkpoint and 24 here"),
        ("simclr", ["--backbone", "vit-nano"], 'backbone "resnet" in the checkpoint and "vit" here'),
        ("byol", [], "was trained with simclr, and byol cannot go on with it"),
    ]:
        assert main(["train", method, *command, *again, *changed]) == 1
        assert words in capsys.readouterr().err, words
    assert main(["train", "simclr", *command, *again, "--hidden_dim", "64", "--allow_changed", "hidden_dim"]) == 1
    assert "and [64, 256] here): give the old values" in capsys.readouterr().err
    assert main(["train", "simclr", *command, *again]) == 0
    fewer = bank.select(range(64)).cast_column("image", load_source("emoji").dataset.features["image"])
    (tmp_path / "fewer").mkdir()
    fewer.to_parquet(tmp_path / "fewer" / "rows.parquet")
    command[1] = str(tmp_path / "fewer" / "rows.parquet")
    assert main(["train", "simclr", *command, *again]) == 1
    assert "dataset.rows 96 in the checkpoint and 64 here" in capsys.readouterr().err
    assert main(["train", "simclr", *command, *again, "--allow_changed", "dataset"]) == 0
    assert main(["train", "simclr", *command, "--resume_from_checkpoint", str(tmp_path / "cli" / "checkpoint-7")]) == 1
    assert "there is no checkpoint" in capsys.readouterr().err
