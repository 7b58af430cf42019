"""Whole commands as a user types them, each in a process of its own, on a folder of small pictures."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import PATIENCE

SECRET = "hf_ThisMustNeverBeWritten42"
STEPS = 80
TRAIN = [
    "--backbone", "resnet-nano", "--image_size", "16", "--per_device_train_batch_size", "8", "--projection_dim", "16",
    "--max_steps", str(STEPS), "--logging_steps", "1", "--save_steps", "1000", "--hub_token", SECRET,
]  # fmt: skip


def start(*argv: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "hf_ssl.cli", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HF_SSL_DEBUG", None)
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )


def run(*argv: object, code: int = 0) -> tuple[str, str]:
    process = start(*argv)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, (out, err)
    return out, err


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes, told apart by colour; 30 pictures each."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (root / name).mkdir()
        for i in range(30):
            noise = rng.integers(-40, 40, (20, 20, 3))
            Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def stopped(pictures, tmp_path_factory) -> tuple[Path, int, str]:
    """A run that SIGTERM ended after its first log line: (folder, exit code, stderr)."""
    folder = tmp_path_factory.mktemp("runs") / "simclr"
    process = start("train", "simclr", "--dataset", pictures, "--output_dir", folder, *TRAIN)
    for line in process.stdout:
        if "'loss'" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate(timeout=PATIENCE)
    return folder, process.returncode, err


@pytest.fixture(scope="module")
def finished(stopped, pictures) -> tuple[Path, str]:
    """The same run, resumed to its end: (folder, stdout)."""
    folder = stopped[0]
    argv = ["train", "simclr", "--dataset", pictures, "--output_dir", folder, *TRAIN, "--resume_from_checkpoint"]
    return folder, run(*argv)[0]


def test_sigterm_saves_and_says_how_to_go_on(stopped):
    folder, code, err = stopped
    assert code == 143, err
    (checkpoint,) = folder.glob("checkpoint-*")
    assert 0 < int(checkpoint.name.split("-")[1]) < STEPS
    last = err.strip().splitlines()[-1]
    assert last.startswith("hf-ssl: Stopped by SIGTERM") and checkpoint.name in last
    assert "--resume_from_checkpoint true" in last
    assert "Traceback" not in err
    card = json.loads((folder / "run.json").read_text())
    assert card["finished"] is False and card["steps"] == int(checkpoint.name.split("-")[1])
    assert card["time_seconds"] > 0 and card["results"] == []


def test_a_run_folder_has_everything(finished, pictures):
    from transformers import AutoConfig

    folder = finished[0]
    assert AutoConfig.from_pretrained(folder).model_type == "resnet"
    assert json.loads((folder / "ssl" / "config.json").read_text())["model_type"] == "ssl_simclr"
    for name in ("model.safetensors", "preprocessor_config.json", "README.md", "trainer_state.json", "report.html"):
        assert (folder / name).is_file(), name
    card = json.loads((folder / "run.json").read_text())
    assert set(card) >= {
        "method", "command", "dataset", "seed", "environment", "arguments", "skipped_images", "results", "init",
        "time_seconds",
    }  # fmt: skip
    assert card["method"] == "simclr" and card["dataset"] == str(pictures) and card["steps"] == STEPS
    assert card["command"].startswith(f"hf-ssl train simclr --dataset {pictures}")
    assert card["skipped_images"] == {"count": 0, "names": []} and card["init"]["from_pretrained"] is None
    assert card["environment"]["transformers"] and card["time_seconds"] > 0 and card["finished"] is True
    assert card["arguments"]["optim"] == "lars" and card["arguments"]["max_steps"] == STEPS
    steps = [entry["step"] for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]]
    assert steps[0] == 1 and steps[-1] == STEPS  # one history, across the stop


def test_the_table_shows_both_baselines(finished):
    folder, out = finished
    rows = json.loads((folder / "run.json").read_text())["results"]
    assert [row["model"] for row in rows] == ["raw pixels", "untrained", "trained"]
    assert rows[0]["knn20_label"] == 1.0 and rows[2]["linear_label"] > 0.9  # red against blue
    assert "12 of its 60 pictures, a fixed draw, are kept for it" in out  # a folder without a test split
    for word in ("arXiv:2002.05709", "60 images", "raw pixels", "untrained", "knn20_label", "report.html"):
        assert word in out, word


def test_no_secret_is_written_anywhere(finished):
    folder, out = finished
    assert SECRET not in out
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    assert "--hub_token ***" in json.loads((folder / "run.json").read_text())["command"]


def test_a_folder_that_holds_a_run_is_left_alone(finished, pictures, capsys, monkeypatch):
    from hf_ssl.cli import main

    folder = finished[0]
    monkeypatch.delenv("HF_SSL_DEBUG", raising=False)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["train", "simclr", "--dataset", str(pictures), "--output_dir", str(folder)]) == 1
    sentence = capsys.readouterr().err
    assert "already holds a run (run.json)" in sentence and "--overwrite" in sentence and sentence.count("\n") == 1
    assert main(["demo", "--output_dir", str(folder)]) == 1
    assert "holds something else" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_overwrite_removes_a_run_and_nothing_else(tmp_path):
    from hf_ssl.cli.runfolder import held_run, prepare

    for name in ("run.json", "mine.txt", "checkpoint-5/trainer_state.json", "checkpoint-mine/a", "ssl/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    prepare(tmp_path, None, overwrite=True)
    assert held_run(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-mine", "mine.txt"]


@pytest.fixture(scope="module")
def used(finished, pictures, tmp_path_factory) -> tuple[Path, str]:
    """evaluate of the run, export and embed of its checkpoint, all in one process: (folder, stdout)."""
    root = tmp_path_factory.mktemp("used")
    folder, checkpoint = finished[0], finished[0] / f"checkpoint-{STEPS}"
    commands = [
        ["evaluate", folder, "--dataset", pictures, "--protocols", "knn", "--k", "5", "--json", root / "rows.json"],
        ["export", checkpoint, "--output", root / "model"],
        ["embed", checkpoint, "--dataset", pictures, "--output", root / "features.npz"],
    ]
    code = f"from hf_ssl.cli import main; [main(argv) and exit(1) for argv in {[[*map(str, c)] for c in commands]}]"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert found.returncode == 0 and "Traceback" not in found.stderr, found.stderr
    return root, found.stdout


def test_evaluate_writes_the_rows(used):
    rows = json.loads((used[0] / "rows.json").read_text())
    assert [row["model"] for row in rows] == ["raw pixels", "untrained", "trained"]
    assert set(rows[2]) == {"protocol", "model", "knn5_label"} and "knn5_label" in used[1]


def test_a_checkpoint_exports_like_the_run(used, finished):
    exported = used[0] / "model" / "model.safetensors"
    assert exported.read_bytes() == (finished[0] / "model.safetensors").read_bytes()
    assert f'AutoModel.from_pretrained("{used[0] / "model"}")' in used[1]


def test_a_checkpoint_embeds(used, pictures):
    with np.load(used[0] / "features.npz", allow_pickle=False) as found:
        assert found["embedding"].shape == (60, 256) and found["embedding"].dtype == np.float32
        assert found["index"].tolist() == list(range(60)) and sorted(set(found["label"].tolist())) == [0, 1]
        assert all((pictures / path).is_file() for path in found["path"])  # below the data set


def test_embedding_files_agree_and_hold_no_pickle(tmp_path):
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from safetensors import safe_open

    from hf_ssl.cli.embeddings import write
    from hf_ssl.data import ImageSource
    from hf_ssl.evaluation import Features

    source = ImageSource("three", Dataset.from_dict({"image": [{"bytes": b"x", "path": None}] * 3}))
    labels = {"group": ["b", "a", None], "label": [2, 0, 1]}
    found = Features(torch.arange(6.0).reshape(3, 2), labels, torch.tensor([0, 1, 2]))
    for name in ("f.parquet", "f.npz", "f.safetensors"):
        write(tmp_path / name, found, source)
    table = pq.read_table(tmp_path / "f.parquet").to_pydict()
    assert table["embedding"] == [[0, 1], [2, 3], [4, 5]] and table["group"] == ["b", "a", None]
    with np.load(tmp_path / "f.npz", allow_pickle=False) as arrays:
        assert arrays["group"].tolist() == ["b", "a", ""] and arrays["embedding"].tolist() == table["embedding"]
    with safe_open(tmp_path / "f.safetensors", "np") as tensors:
        names = json.loads(tensors.metadata()["group"])
        assert [names[i] for i in tensors.get_tensor("group")] == ["b", "a", ""]
        assert tensors.get_tensor("label").tolist() == [2, 0, 1]


def test_the_demo_is_a_train_command():
    from hf_ssl.cli.demo import divide, make_plan
    from hf_ssl.cli.flags import Parsed

    plan = make_plan(Parsed([], {"steps": 5, "seed": 3, "threads": 2, "output_dir": "x"}))
    assert (plan.method, plan.dataset, plan.output_dir) == ("simclr", "emoji:placed", Path("x"))
    assert plan.recipe.name == "simclr_emoji_placed.yaml"
    assert plan.values["max_steps"] == 5 and plan.values["seed"] == 3
    assert plan.argv == ["demo", "--steps=5", "--seed=3", "--threads=2", "--output_dir=x"]
    assert divide(1) == (1, 1) and divide(2) == (1, 2) and divide(8) == (2, 6) and divide(64)[0] == 8


def test_broken_pictures_stop_a_run_in_one_sentence(pictures, tmp_path):
    root = tmp_path / "mostly broken"
    root.mkdir()
    for i in range(12):
        (root / f"{i}.png").write_bytes((pictures / "red" / f"{i}.png").read_bytes() if i < 6 else b"not a picture")
    argv = ["--dataset", root, "--output_dir", tmp_path / "run", *TRAIN[:-2], "--max_bad_fraction", "0.2"]
    _, err = run("train", "simclr", *argv, code=1)
    last = err.strip().splitlines()[-1]
    assert last.startswith("hf-ssl: ") and "cannot be decoded" in last and "Traceback" not in err


def test_accelerate_on_cpus_gets_all_its_processes(pictures, tmp_path):
    """accelerate 1.15 starts one process under --cpu, whatever --num_processes says; the CLI starts the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    accelerate += ["--main_process_port", str(port), "-m", "hf_ssl.cli", "train", "simclr", "--no_evaluation"]
    argv = ["--dataset", pictures, "--output_dir", tmp_path / "run", *TRAIN, "--max_steps", "6", "--no_report"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*accelerate, *map(str, argv)], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert found.returncode == 0, found.stderr
    assert "6 steps of 16 images on 2 processes" in found.stdout
    assert found.stdout.count("arXiv:2002.05709") == 1  # one process speaks
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert card["environment"]["processes"] == 2 and card["steps"] == 6
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(6 * 16 / 48)  # 60 pictures are 3 whole global batches
