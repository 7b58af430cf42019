"""Training data streamed from a loopback Hub that fails; run by tests.hub.scenarios."""

import contextlib
import io
import itertools
import os
import time
from pathlib import Path
from typing import Any

from tests.hub_server import LoopbackHub


def stream(folder: Path, hub: LoopbackHub) -> dict[str, Any]:
    """500 batches streamed while a fifth of the requests fails, against the same without faults; then a lost file."""
    import random

    from huggingface_hub import HfApi

    from hf_ssl.data import load_source
    from hf_ssl.data.remote import RemoteError
    from hf_ssl.data.stream import RowStream

    waited = quick_waits()
    api = HfApi()
    for kind in ("shards", "loose"):
        api.create_repo(f"alice/{kind}", repo_type="dataset")
        write_pictures(folder / kind, shards=kind == "shards")
        api.upload_folder(folder_path=folder / kind, repo_id=f"alice/{kind}", repo_type="dataset")
    rng, failed = random.Random(0), []

    def fifth(method: str, path: str) -> Any:
        if rng.random() > 0.2:
            return None
        failed.append(path)
        return rng.choice([500, 503, "reset", "cut", 0.05])

    def rows(repo: str, steps: int) -> list:
        source = load_source(repo, streaming=True)
        found = itertools.islice(RowStream(source, 4, seed=3, shuffle_buffer=64), 4 * steps)
        return [(row["_epoch"], row["_index"], int(source.decode(row).sum())) for row in found]

    found: dict[str, Any] = {}
    for repo, steps in (("alice/shards", 500), ("alice/loose", 20)):
        calm = rows(repo, steps)
        hub.fault, before = fifth, len(failed)
        broken = rows(repo, steps)
        hub.fault = lambda method, path: None
        found[repo] = {"rows": len(calm), "same": calm == broken, "faults": len(failed) - before}
        found[repo] |= {"epochs": len({row[0] for row in calm}), "distinct": len({row[1:] for row in calm})}
    found["waits"] = len(waited)
    found["lost"] = lost_file(folder, hub)
    try:
        source = load_source("alice/shards", streaming=True)
        hub.fault = lambda method, path: 503 if "resolve" in path else None
        next(iter(RowStream(source, 4)))
    except RemoteError as error:
        found["busy for long"] = str(error)
    finally:
        hub.fault = lambda method, path: None
    return found


def quick_waits() -> list[float]:
    """Back-off as it is, a hundred times faster; the waits that were asked for."""
    waited: list[float] = []
    sleep = time.sleep

    def quick(seconds: float) -> None:
        waited.append(seconds)
        sleep(seconds / 100)

    time.sleep = quick
    return waited


def write_pictures(folder: Path, shards: bool) -> None:
    """256 small pictures: as four parquet files, or 24 of them as files in two folders."""
    import datasets
    from PIL import Image

    from tests.contract.tiny import pictures

    count = 256 if shards else 24
    made = [Image.fromarray(image) for image in pictures(count, side=16)]
    if shards:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        whole = datasets.Dataset.from_dict({"image": made, "label": [i % 2 for i in range(count)]}, features)
        (folder / "data").mkdir(parents=True)
        for i in range(4):
            whole.shard(4, i).to_parquet(folder / "data" / f"train-{i}-of-4.parquet", batch_size=16)
    else:
        for i, image in enumerate(made):
            (folder / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            image.save(folder / "train" / "ab"[i % 2] / f"{i}.png")


def lost_file(folder: Path, hub: LoopbackHub) -> dict[str, Any]:
    """A shard is removed while training streams it: the exit code, the sentence, the checkpoint."""
    from hf_ssl.cli import main

    asked: list[str] = []

    def gone(method: str, path: str) -> Any:
        if "train-2-of-4" in path and "resolve" in path:
            asked.append(path)
            return 404 if len(asked) > 2 else None
        return None

    os.chdir(folder)
    hub.fault = gone
    command = ["train", "simclr", "--dataset", "alice/shards", "--streaming", "--output_dir", "lost", "--backbone"]
    command += ["resnet-pico", "--image_size", "16", "--max_steps", "400", "--per_device_train_batch_size", "16"]
    command += ["--projection_dim", "8", "--use_cpu", "--no_evaluation", "--no_report", "--shuffle_buffer", "16"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main([*command, "--precision", "fp32", "--dataloader_num_workers", "1", "--disable_tqdm"])
    hub.fault = lambda method, path: None
    checkpoints = [path.name for path in (folder / "lost").glob("checkpoint-*")]
    return {"code": code, "said": said.getvalue().strip().splitlines()[-1], "checkpoints": checkpoints}
