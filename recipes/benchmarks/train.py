"""Images per second of training, decoding to optimiser step: ``hf-ssl train`` beside lightly's documented loop.

    python recipes/benchmarks/train.py [--rows NAME ...] [--rounds 5] [--bf16] [--json FILE] [--picture FILE]

The same data, backbone, batch, views (the paper's probabilities and ranges) and optimiser class; no workers on either
side, one thread. Ours is what the command runs, in the precision it chooses (--precision auto); lightly's is fp32 as
in its documentation, with --bf16 under bf16 autocast as well. The sides take turns, a few steps at a time, and the
time is the CPU time of the process: the median of the rounds after one to warm up. Photos are 500x375 JPEG files;
32x32 is Fashion-MNIST, which lightly gets decoded. On two x86 cores a few minutes a row, DINO the longest.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import matplotlib
import torch
from lightly_loops import LOOPS, Pictures, batches, optimiser, settings, transform
from PIL import Image
from transformers import TrainerCallback

from hf_ssl import backbones
from hf_ssl.cli.pictures import load_pictures
from hf_ssl.cli.plan import plan_training
from hf_ssl.cli.train import build_trainer
from hf_ssl.data import ImageSource
from hf_ssl.evaluation import format_table


@dataclass(frozen=True)
class Row:
    """method, dataset ("photos" or a name), images a step, steps a round, flags of `hf-ssl train`, ratio wanted."""

    method: str
    dataset: str
    batch: int
    steps: int
    flags: tuple[str, ...]
    target: float


_SGD = ("--optim", "sgd_nesterov", "--learning_rate", "0.06", "--weight_decay", "0.0005")
ROWS = {
    "simclr-r18-224": Row("simclr", "photos", 32, 2, ("--backbone", "resnet-18", "--image_size", "224", *_SGD), 1.5),
    "dino-vits-224": Row(
        "dino", "photos", 4, 2,
        ("--backbone", "vit-small", "--image_size", "224", "--local_pixel_values", '{"count": 6}', "--learning_rate",
         "0.0005"), 2.0,
    ),
    "simclr-r18-32": Row(
        "simclr", "fashion-mnist", 256, 2,
        ("--backbone", "resnet-18", "--image_size", "32", "--blur_p", "0", "--hidden_dim", "512", *_SGD), 2.0,
    ),
}  # fmt: skip


def write_photos(folder: Path, count: int) -> None:
    """JPEG files of 500x375, crops of one photograph."""
    photo = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    for i in range(count):
        left, top = i % 12, i * 7 % 230
        photo.crop((left, top, left + 500, top + 375)).save(folder / f"{i:04}.jpg", quality=90)


class TakeTurns(TrainerCallback):
    """Times `steps` steps of the trainer it belongs to, views included, then lets each peer do as many."""

    def __init__(self, row: Row, peers: dict[str, Callable[[], None]], rounds: int):
        self.row, self.peers, self.rounds = row, peers, rounds
        self.times: dict[str, list[float]] = {name: [] for name in ("hf_ssl", *peers)}
        self._mark = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.row.steps:
            return
        self.times["hf_ssl"].append(time.process_time() - self._mark)
        for name, step in self.peers.items():
            start = time.process_time()
            for _ in range(self.row.steps):
                step()
            self.times[name].append(time.process_time() - start)
        control.should_training_stop = len(self.times["hf_ssl"]) > self.rounds
        self._mark = time.process_time()


def peer_step(plan: Any, trainer: Any, dtype: torch.dtype) -> Callable[[], None]:
    """One step of lightly's loop, next batch included."""
    s, source = settings(plan, trainer), trainer.train_source
    module = LOOPS[plan.method](backbones.build(trainer.method.backbone.config), s).train()
    views = transform(plan.method, s, trainer.processing_class)
    stream = batches(Pictures(peer_pictures(source), views), trainer.args.per_device_train_batch_size)
    optimizer = optimiser(module, s)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = module.loss(next(stream), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def peer_pictures(source: ImageSource) -> list[Any]:
    """Files to open with PIL, as LightlyDataset does, or decoded pictures, as torchvision's small datasets are."""
    if source.name == "fashion-mnist":
        return [source.image(row, i) for i, row in enumerate(source.dataset)]
    paths = [row["image"]["path"] for row in source.dataset]
    return [lambda path=path: Image.open(path).convert("RGB") for path in paths]


def measure(name: str, rounds: int, bf16: bool) -> list[dict[str, Any]]:
    """One line per side of the row."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        data = row.dataset
        if data == "photos":
            data = f"{folder}/photos"
            Path(data).mkdir()
            write_photos(Path(data), 4 * row.batch)
        own = {
            "dataset": data, "output_dir": f"{folder}/run", "max_steps": 10_000, "dataloader_num_workers": 0,
            "per_device_train_batch_size": row.batch, "save_strategy": "no", "logging_strategy": "no",
            "disable_tqdm": "true",
        }  # fmt: skip
        words = [word for key, value in own.items() for word in (f"--{key}", str(value))]
        plan = plan_training([row.method, *words, "--no_evaluation", "--no_report", *row.flags])
        trainer = build_trainer(plan, load_pictures(plan))
        peers = {"lightly": peer_step(plan, trainer, torch.float32)}
        if bf16:
            peers["lightly + bf16"] = peer_step(plan, trainer, torch.bfloat16)
        turns = TakeTurns(row, peers, rounds)
        trainer.add_callback(turns)
        trainer.train()
    lines = []
    for side, times in turns.times.items():
        speed = [row.batch * row.steps / seconds for seconds in times[1:]]
        ratios = [theirs / ours for theirs, ours in zip(times[1:], turns.times["hf_ssl"][1:], strict=True)]
        lines.append(
            {"row": name, "side": side, "images/s": round(statistics.median(speed), 1),
             "range": f"{min(speed):.1f}-{max(speed):.1f}", "hf_ssl is faster by": round(statistics.median(ratios), 2),
             "wanted": row.target if side != "hf_ssl" else "", "load": round(os.getloadavg()[0], 1)}
        )  # fmt: skip
    return lines


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Bars: images per second relative to lightly's loop."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(dict.fromkeys(line["row"] for line in lines))
    sides = list(dict.fromkeys(line["side"] for line in lines))
    figure, axis = pyplot.subplots(figsize=(1.5 + 1.8 * len(rows), 3.2))
    for i, side in enumerate(sides):
        speed = {line["row"]: line["images/s"] for line in lines if line["side"] == side}
        base = {line["row"]: line["images/s"] for line in lines if line["side"] == "lightly"}
        places = [k + (i - (len(sides) - 1) / 2) * 0.8 / len(sides) for k in range(len(rows))]
        axis.bar(places, [speed[row] / base[row] for row in rows], 0.76 / len(sides), label=side)
    axis.set_xticks(range(len(rows)), rows)
    axis.set_ylabel("images per second, lightly = 1")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="lightly's loop under bf16 autocast as well")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    for name in args.rows:
        lines += measure(name, args.rounds, args.bf16)
        print(format_table(lines), flush=True)
    if args.json:
        args.json.write_text(json.dumps(lines, indent=2))
    if args.picture:
        draw(lines, args.picture)


if __name__ == "__main__":
    main()
