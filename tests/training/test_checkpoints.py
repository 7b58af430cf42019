"""Of a run's checkpoints the newest whole one is found, whatever happened to the others."""

import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch

from hf_ssl.cli import main
from hf_ssl.hub.folder import publishable
from hf_ssl.training.checkpoints import (
    MANIFEST,
    damage,
    last_complete_checkpoint,
    newest_whole,
    require_whole,
    seal,
    trouble,
)

from .conftest import make_trainer

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path: Path) -> None:
    """64 other bytes, the size as it was."""
    content, at = path.read_bytes(), path.stat().st_size * 2 // 3
    path.write_bytes(content[:at] + bytes(byte ^ 1 for byte in content[at : at + 64]) + content[at + 64 :])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of four steps with checkpoints at 2 and 4, and the weights that it ended with."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(pictures, folder, max_steps=4)
    trainer.train()
    return folder, {name: value.clone() for name, value in trainer.method.state_dict().items()}


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_checkpoint_lists_all_of_its_files(run):
    folder = run / "checkpoint-4"
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(listed) == {path.name for path in folder.iterdir()} - {MANIFEST} > set(FILES)
    assert all((folder / name).stat().st_size == size for name, (size, _) in listed.items())
    assert trouble(folder) is None


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("harm", [missing, empty, half, changed])
def test_a_damaged_checkpoint_is_passed_over_and_named(run, name, harm):
    harm(run / "checkpoint-4" / name)
    if (name, harm) == (MANIFEST, missing):  # as an earlier version left it
        assert last_complete_checkpoint(run) == str(run / "checkpoint-4")
        return
    whole, passed = newest_whole(run)
    assert whole == str(run / "checkpoint-2")
    assert passed == [f"checkpoint-4 ({trouble(run / 'checkpoint-4')})"] and name in passed[0]
    with pytest.raises(ValueError, match=f"not whole: {name}.*; the newest whole one is {run}/checkpoint-2"):
        require_whole(run / "checkpoint-4")


def test_a_run_goes_on_from_the_whole_one_and_says_so(trained, run, pictures, caplog):
    changed(run / "checkpoint-4" / "optimizer.pt")
    trainer = make_trainer(pictures, run, max_steps=4)
    with caplog.at_level("WARNING", logger="hf_ssl.training"):
        trainer.train(resume_from_checkpoint=True)
    said = "Passed over: checkpoint-4 (optimizer.pt holds other bytes than were written). The run goes on from checkp"
    assert said in caplog.text
    for name, value in trained[1].items():
        assert torch.equal(value, trainer.method.state_dict()[name]), name
    assert trouble(run / "checkpoint-4") is None  # written anew
    empty(run / "checkpoint-4" / "model.safetensors")
    with pytest.raises(ValueError, match=r"not whole: model\.safetensors has 0 of"):
        make_trainer(pictures, run, max_steps=4).train(resume_from_checkpoint=str(run / "checkpoint-4"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [missing, empty, half])
def test_without_a_list_a_file_is_held_against_what_it_says_of_itself(run, name, harm):
    (run / "checkpoint-4" / MANIFEST).unlink()
    assert trouble(run / "checkpoint-4") is None
    harm(run / "checkpoint-4" / name)
    assert name in trouble(run / "checkpoint-4")


def test_folders_of_sharded_states_are_listed_too(tmp_path):
    """FSDP and DeepSpeed write folders; here as they name them."""
    for kind, places in {
        "fsdp": ("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "optimizer_0/__1_0.distcp"),
        "deepspeed": ("global_step4/mp_rank_00_model_states.pt", "global_step4/zero_pp_rank_0_optim_states.pt"),
    }.items():
        folder = tmp_path / kind / "checkpoint-4"
        for place in places:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(place.encode() * 9)
        for name in ("scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
            if (kind, name) != ("deepspeed", "scheduler.pt"):
                zipfile.ZipFile(folder / name, "w").close()
        (folder / "trainer_state.json").write_text("{}")
        assert trouble(folder) is None
        seal(folder, {})
        assert trouble(folder) is None
        changed(folder / places[0])
        assert damage(folder) == f"{places[0]} holds other bytes than were written"
        missing(folder / places[-1])
        assert damage(folder) == f"{places[-1]} is missing"


def test_what_is_no_checkpoint_is_told(run):
    with pytest.raises(ValueError, match=f"there is no checkpoint {run}/checkpoint-9; the newest whole one is"):
        require_whole(run / "checkpoint-9")
    with pytest.raises(ValueError, match=r"is a run, not a checkpoint of one; the newest whole one is .*checkpoint-4"):
        require_whole(run)
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-4").write_text("a file")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    assert newest_whole(run) == (None, ["checkpoint-2 (optimizer.pt is missing)"])


def test_an_old_checkpoint_is_removed_only_when_the_new_one_is_whole(tmp_path, pictures, monkeypatch):
    def full(folder, facts):
        if Path(folder).name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        seal(folder, facts)

    monkeypatch.setattr("hf_ssl.training.checkpointing.checkpoints.seal", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*checkpoint-4.*last good checkpoint is .*-2"):
        make_trainer(pictures, tmp_path, max_steps=4, save_total_limit=1).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(OSError, match=r"There is no earlier checkpoint.*begin again: .* --overwrite"):
        make_trainer(pictures, tmp_path / "first", max_steps=4, save_steps=4).train()


def test_what_a_kill_left_of_a_checkpoint_pushes_no_whole_one_out(run, pictures):
    """Being removed made it the newest by time."""
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    (run / "checkpoint-3").mkdir()
    for name, age in (("checkpoint-4", 10), ("checkpoint-2", 0), ("checkpoint-3", 0)):
        os.utime(run / name, (time.time() - age,) * 2)
    make_trainer(pictures, run, max_steps=6, save_total_limit=2).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_pushed_checkpoint_is_whole_without_the_paths_that_are_cut_from_it(trained, tmp_path, pictures):
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(trained[0] / "checkpoint-4", checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = "/home/anna/run/checkpoint-2"
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    trainer = make_trainer(pictures, tmp_path, hub_strategy="checkpoint")
    copies = trainer.checkpoint_copy(checkpoint, tmp_path / "push")
    pushed = tmp_path / "pulled"
    for name, file in copies.items():
        content = publishable(file)
        (pushed / name).parent.mkdir(parents=True, exist_ok=True)
        (pushed / name).write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())
    assert trouble(pushed / "last-checkpoint") is None
    assert set(FILES) | {MANIFEST} <= {path.name for path in (pushed / "last-checkpoint").iterdir()}
    assert "anna" not in (pushed / "last-checkpoint" / "trainer_state.json").read_text()


def test_the_commands_tell_a_damaged_model_and_a_run_without_checkpoint_in_a_sentence(run, tmp_path, capsys):
    changed(run / "checkpoint-4" / "model.safetensors")
    folder, output = str(run / "checkpoint-4"), str(tmp_path / "new")
    for command in (
        ["export", folder, "--output", output],
        ["evaluate", folder, "--dataset", "emoji"],
        ["embed", folder, "--dataset", "emoji", "--output", f"{output}.npz"],
        ["pseudo-label", folder, "--dataset", "emoji", "--output", f"{output}.parquet"],
        ["report", folder],
        ["publish", folder, "someone/something"],
    ):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"hf-ssl: {command[0]}: the model in {folder} is not whole: model.safetensors holds")
        assert said.rstrip().endswith(f"the newest whole one is {run}/checkpoint-2.")

    words = ["train", "simclr", "--dataset", "emoji"]

    def resumed(place: Path) -> str:
        assert main([*words, "--output_dir", str(place), "--resume_from_checkpoint"]) == 1
        return capsys.readouterr().err

    (tmp_path / "begun").mkdir()
    assert "holds no run to resume" in resumed(tmp_path / "begun")
    (tmp_path / "begun" / "run.json").write_text("{}")
    assert "ended before its first checkpoint" in (said := resumed(tmp_path / "begun")) and "--overwrite" in said
    assert sorted(path.name for path in (tmp_path / "begun").iterdir()) == ["run.json"]
