"""Runs that publish while they train and are killed in the middle of an upload; run by tests.hub.scenarios."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests import PATIENCE
from tests.hub_server import LoopbackHub

TRAIN = [
    "train", "simclr", "--dataset", "photos", "--output_dir", "run", "--backbone", "resnet-pico", "--image_size", "16",
    "--max_steps", "8", "--save_steps", "2", "--per_device_train_batch_size", "8", "--projection_dim", "8",
    "--use_cpu", "--no_report", "--no_evaluation", "--disable_tqdm", "--push_to_hub", "--hub_model_id", "alice/run",
    "--precision", "fp32", "--hub_always_push",
]  # fmt: skip


def killed(folder: Path, hub: LoopbackHub) -> dict[str, Any]:
    """kill -9 while the second upload is under way; resumed to the end; then every commit is loaded."""
    from hf_ssl.cli import main
    from tests.hub.scenarios import photos

    photos(folder / "photos")
    os.chdir(folder)
    uploading = threading.Event()

    def slow_second_upload(method: str, path: str) -> Any:
        if method == "PUT" and "/_lfs/" in path and len(hub.store.history("alice/run")) == 2:
            uploading.set()
            return 20.0
        return None

    hub.fault = slow_second_upload
    process = train("every_save")
    assert uploading.wait(PATIENCE), process.communicate()
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.fault = lambda method, path: None
    found: dict[str, Any] = {"killed": process.returncode, "after the kill": titles(hub)}
    found["left"] = len(list((folder / "run").glob(".publish-*")))
    process = train("checkpoint", "--resume_from_checkpoint", "true")
    found["said"] = process.communicate(timeout=PATIENCE)
    found["resumed"] = process.returncode
    found["in the end"], found["left in the end"] = titles(hub), len(list((folder / "run").glob(".publish-*")))
    found["steps"] = [steps(commit["id"]) for commit in hub.store.history("alice/run")[:-1]]
    found["again"] = resume_from_hub(folder)
    found["published"] = main(["publish", "run/checkpoint-6", "alice/run"])
    found["step published"] = steps("main")
    found["files"] = sorted(hub.store.files("alice/run"))
    return found


def train(strategy: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hf_ssl.cli", *TRAIN, "--hub_strategy", strategy, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def titles(hub: LoopbackHub) -> list[str]:
    return [commit["title"] for commit in hub.store.history("alice/run")]


def steps(revision: str) -> int:
    """Load root and method of a commit, compare them; the step it was taken at."""
    import torch
    from transformers import AutoModel

    from hf_ssl import SimCLRForPreTraining

    native = AutoModel.from_pretrained("alice/run", revision=revision)
    method = SimCLRForPreTraining.from_pretrained("alice/run", revision=revision)
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(native(pixels).pooler_output.flatten(1), method.features(pixels))
    return int(method.step)


def resume_from_hub(folder: Path) -> int:
    """Another machine: only the repo's last-checkpoint/ is there to go on from; the steps it then counts."""
    from huggingface_hub import snapshot_download

    from hf_ssl.cli import main

    fetched = snapshot_download("alice/run", local_dir=folder / "fetched")
    command = [word if word != "run" else "elsewhere" for word in TRAIN if word != "--push_to_hub"]
    command[command.index("--max_steps") + 1] = "10"
    assert main([*command, "--resume_from_checkpoint", f"{fetched}/last-checkpoint"]) == 0
    from hf_ssl.hub import load_method

    return int(load_method(folder / "elsewhere")[0].step)
