"""Features learned in equal CPU time: SimCLR, DINO and MAE here and of lightly's building blocks, the same backbones.

    python recipes/benchmarks/quality.py --final --json quality.jsonl --picture quality.png      # goes on where it was
    python recipes/benchmarks/quality.py --tune --budget 60 --methods simclr --side ours --set --temperature 0.2

The budget is CPU time of the training process, first batch to last step: views, forward, backward and optimiser on
one torch thread, no workers. Learning rate, momentum and every other schedule follow the share of the budget that is
spent, on both sides. No labels and no test images are trained on; --tune trains on five sixths of the training images
and measures on the rest, --final trains on all of them and measures on the test images. Ours is the recipe through the
code of ``hf-ssl train``; lightly's are its modules, losses and transforms in the loops of its documentation, with the
recipe's backbone, optimiser class and precision, channels-last as well, pictures already decoded. kNN-20 is of the
feature that plain transformers gives, "mean" of the mean patch token, "2x2" of the feature map pooled to four places;
the columns after them and the picture are of the feature in FEATURE.
Both sides were tuned on held-out training images: in 115 runs (ours) and 131 (lightly's) of a stand-in program on a
GPU, then in ten of 84 CPU seconds for each method and side; what gained .25 points alone was taken together, unless
the stand-in's longer runs spoke against it. MAE once more, in 94 and 93 runs of whole length on the GPU, then in 15
and 15 of 330 or 400 CPU seconds. LIGHTLY is what differs. lightly's transforms know no erasing, its MAE's no colour
and no shift either, and it always mirrors: erasing and mirroring are set here on their torchvision parts.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import datasets
import numpy as np
import torch
import torch.nn.functional as F
from equal_cpu import NOWHERE, Budget, Data, set_learning_rate, set_up
from lightly_loops import LOOPS, batches, optimiser, settings, transform
from lightly_loops import Pictures as PeerPictures
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification

from hf_ssl import backbones
from hf_ssl.cli.plan import Plan
from hf_ssl.data import ImageSource
from hf_ssl.evaluation import format_table, knn_accuracy, linear_probe, low_shot

RECIPES = Path(__file__).parents[1]
METHODS = ("simclr", "dino", "mae")
LABEL = {"fashion-mnist": "label", "emoji": "group"}
FEATURE = {"simclr": "pooled", "dino": "pooled", "mae": "mean"}
LIGHTLY: dict[tuple[str, str], dict[str, Any]] = {  # where its side differs from the recipe: (dataset, method)
    ("fashion-mnist", "simclr"): {"scale": [0.2, 1.0], "weight_decay": 1e-4},
    ("fashion-mnist", "mae"): {"per_device_train_batch_size": 128, "learning_rate": 0.002},
}
Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]  # (B, C, H, W) -> feature (B, D), patch tokens (B, N, D)


def pictures(source: ImageSource) -> list[np.ndarray]:
    return [source.image(row, i) for i, row in enumerate(source.dataset)]


def labels(data: Data, source: ImageSource) -> list:
    return list(source.dataset[LABEL[data.name]])


def setup(method: str, data: Data, seed: int, folder: str = NOWHERE, flags: Sequence[str] = ()) -> tuple[Plan, Any]:
    """The recipe's plan and an SSLTrainer of it."""
    recipe = RECIPES / f"{method}_{data.name}.yaml"
    return set_up(method, data, seed, recipe, folder, ["--logging_strategy", "no", *flags])


def train_ours(method: str, data: Data, seed: int, seconds: float, flags: Sequence[str]) -> tuple[Encoder, int, float]:
    """(encoder, images seen, CPU seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        _, trainer = setup(method, data, seed, folder, flags)
        budget = Budget(trainer, seconds)
        trainer.add_callback(budget)
        trainer.train()
    images = trainer.state.global_step * trainer.args.per_device_train_batch_size
    return native_encoder(trainer.method.export_backbone), images, budget.spent


def native_encoder(backbone: Any) -> Encoder:
    backbone.eval()
    return lambda images: (backbones.features(backbone, images), backbones.patch_tokens(backbone, images))


def train_peer(
    method: str, data: Data, seed: int, seconds: float, changes: dict[str, Any]
) -> tuple[Encoder, int, float]:
    """(encoder, images seen, CPU seconds)."""
    plan, trainer = setup(method, data, seed)
    s = settings(plan, trainer) | LIGHTLY.get((data.name, method), {}) | changes
    processor = trainer.processing_class
    torch.manual_seed(seed)
    backbone = backbones.build(trainer.method.backbone.config)
    module = LOOPS[method](backbone, s)
    module.to(memory_format=torch.channels_last).train()
    views = transform(method, s, processor)
    stream = batches(PeerPictures(pictures(data.train), views), s["per_device_train_batch_size"])
    optimizer = optimiser(module, s)
    start, images = time.process_time(), 0
    while (share := (time.process_time() - start) / seconds) < 1:
        batch = next(stream)
        set_learning_rate(optimizer, share, s["learning_rate"], s["warmup_steps"])
        with torch.autocast("cpu", torch.bfloat16, enabled=s["precision"] == "bf16"):
            loss = module.loss(batch, share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images += len(batch[0])
    spent = time.process_time() - start
    module.eval()
    return (module.encode if method == "mae" else native_encoder(module.export())), images, spent


def train_supervised(data: Data, seed: int, seconds: float) -> tuple[Encoder, int, float]:
    """All labels, SimCLR's backbone, shifted and mirrored pictures: what the same network could know."""
    trainer = setup("simclr", data, seed)[1]
    processor, config = trainer.processing_class, trainer.method.backbone.config
    names = sorted(set(labels(data, data.train)))
    truth = torch.tensor([names.index(label) for label in labels(data, data.train)])
    images = eval_tensor(pictures(data.train), processor)
    torch.manual_seed(seed)
    config.num_labels = len(names)
    model: Any = AutoModelForImageClassification.from_config(config)
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    start, seen, batch = time.process_time(), 0, 128
    while (share := (time.process_time() - start) / seconds) < 1:
        rows = torch.randint(len(images), (batch,))
        shift = torch.randint(-2, 3, (2,)).tolist()
        views = images[rows].roll(shift, (2, 3))
        views = views.flip(3) if torch.rand(()) < 0.5 else views
        set_learning_rate(optimizer, share, 0.1, 0.05)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(views).logits.float(), truth[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += batch
    return native_encoder(backbones.unwrap(model)), seen, time.process_time() - start


def eval_tensor(pictures: list[np.ndarray], processor: Any) -> Tensor:
    """(N, C, H, W) float32, as the exported image processor makes it."""
    native, channels = processor.eval_processor(), processor.num_channels
    squeezed = [Image.fromarray(picture.squeeze()) for picture in pictures]
    size = (processor.size["width"], processor.size["height"])
    if all(picture.size == size for picture in squeezed):  # nothing to resize
        values = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v).view(1, channels, 1, 1) for v in (processor.image_mean, processor.image_std))
        return (values - mean) / std
    parts = [native(squeezed[i : i + 512], return_tensors="pt")["pixel_values"] for i in range(0, len(squeezed), 512)]
    return torch.cat(parts)


@torch.no_grad()
def variants(encode: Encoder, images: Tensor) -> dict[str, Tensor]:
    """{"pooled", "mean", "2x2": (N, D)}; those that would repeat another are left out."""
    found: dict[str, list[Tensor]] = {}
    for part in images.split(1000):
        pooled, tokens = encode(part)
        found.setdefault("pooled", []).append(pooled)
        side = round(tokens.shape[1] ** 0.5)
        found.setdefault("mean", []).append(tokens.mean(1))
        if side > 1:
            grid = tokens.transpose(1, 2).unflatten(2, (side, side))
            found.setdefault("2x2", []).append(F.adaptive_avg_pool2d(grid, 2).flatten(1))
    features = {name: torch.cat(parts).float() for name, parts in found.items()}
    if torch.allclose(features["mean"], features["pooled"], rtol=1e-3, atol=1e-4):
        del features["mean"]
    return features


def measure(data: Data, bank: dict[str, Tensor], queries: dict[str, Tensor], feature: str) -> dict[str, float]:
    """Per cent: kNN-20 of every variant; linear probe, 40 and 400 labels of `feature`."""
    fit, score = labels(data, data.train), labels(data, data.queries)
    row = {}
    for name in bank:
        knn = knn_accuracy(bank[name], fit, queries[name], score, k=20)
        row["knn20" if name == "pooled" else f"knn20 {name}"] = knn["knn20_top1"]
    chosen = (bank[feature], fit, queries[feature], score)
    row["linear"] = float(linear_probe(*chosen)["top1"])
    few = low_shot(*chosen, fractions=[count / len(fit) for count in (40, 400)], draws=5)
    row |= dict(zip(("40 labels", "400 labels"), few.values(), strict=True))
    return {name: round(100 * value, 2) for name, value in row.items()}


class Bench:
    """Runs one (dataset, method, side, seed) after the other and keeps every row in a file of JSON lines."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.path = args, args.json
        self.rows: list[dict[str, Any]] = []
        if self.path and self.path.exists():
            self.rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        self._tensors: dict[tuple, tuple[Tensor, Tensor]] = {}

    def run(self, data: Data, method: str, side: str, seed: int) -> None:
        args = self.args
        budget = 0.0 if side in ("raw pixels", "untrained") else args.budget
        key = {
            "dataset": data.name, "mode": "final" if args.final else "tune", "method": method, "side": side,
            "seed": seed, "budget": budget, "set": " ".join(args.set) if side in ("ours", "lightly") else "",
        }  # fmt: skip
        if any(key.items() <= row.items() for row in self.rows):
            return
        started = time.time()
        encode, images, spent = self._encoder(data, method, side, seed)
        bank, queries = (self._features(data, source, method, encode) for source in (data.train, data.queries))
        feature = FEATURE[method] if FEATURE[method] in bank else "pooled"
        row = key | measure(data, bank, queries, feature)
        row |= {"images": images, "cpu_seconds": round(spent, 1), "wall_seconds": round(time.time() - started, 1)}
        row |= {"load": round(os.getloadavg()[0], 2)}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _encoder(self, data: Data, method: str, side: str, seed: int) -> tuple[Encoder, int, float]:
        if side == "raw pixels":
            return lambda images: (images.flatten(1), images.flatten(1)[:, None]), 0, 0.0
        if side == "untrained":
            return native_encoder(setup(method, data, seed)[1].method.export_backbone), 0, 0.0
        if side == "supervised":
            return train_supervised(data, seed, self.args.budget)
        if side == "ours":
            return train_ours(method, data, seed, self.args.budget, self.args.set)
        return train_peer(method, data, seed, self.args.budget, parse_changes(self.args.set))

    def _features(self, data: Data, source: ImageSource, method: str, encode: Encoder) -> dict[str, Tensor]:
        processor = setup(method, data, 0)[1].processing_class
        key = (id(source), str(processor.size), str(processor.image_mean))
        if key not in self._tensors:
            self._tensors[key] = eval_tensor(pictures(source), processor)
        return variants(encode, self._tensors[key])

    def table(self) -> list[dict[str, Any]]:
        """Mean and, after ±, half the range over the seeds."""
        groups: dict[tuple, list[dict[str, Any]]] = {}
        mode = "final" if self.args.final else "tune"
        for row in self.rows:
            if row["mode"] == mode and row["budget"] in (0.0, self.args.budget):
                groups.setdefault((row["dataset"], row["method"], row["side"], row["set"]), []).append(row)
        table = []
        for (dataset, method, side, changed), rows in groups.items():
            line = {"dataset": dataset, "method": method, "side": f"{side} {changed}".strip(), "seeds": len(rows)}
            for name in MEASURES:
                if values := [row[name] for row in rows if name in row]:
                    spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
                    line[name] = f"{statistics.mean(values):.1f}{spread}"
            table.append(line | {"images": f"{statistics.mean(row['images'] for row in rows):,.0f}"})
        return table


MEASURES = ("knn20", "knn20 mean", "knn20 2x2", "linear", "40 labels", "400 labels")


def parse_changes(words: Sequence[str]) -> dict[str, Any]:
    """``--name value`` pairs; values are JSON where they parse as such."""
    changes = {}
    for name, value in zip(words[::2], words[1::2], strict=True):
        try:
            changes[name.lstrip("-")] = json.loads(value)
        except ValueError:
            changes[name.lstrip("-")] = value
    return changes


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """kNN-20 of both sides per method with the range of the seeds; what is no self-supervision as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = {method: "knn20 mean" if FEATURE[method] == "mean" else "knn20" for method in METHODS}
    names = list(dict.fromkeys(row["dataset"] for row in table))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 3.4), squeeze=False)
    for axis, dataset in zip(axes[0], names, strict=True):
        rows = [row for row in table if row["dataset"] == dataset]
        sides = (-0.1, "ours", "hf_ssl", "#2a6f97"), (0.1, "lightly", "lightly", "#c9a227")
        for shift, side, label, colour in sides:
            mine = [row for row in rows if row["side"] == side]
            values = [[float(part) for part in f"{row[columns[row['method']]]} ± 0".split(" ± ")[:2]] for row in mine]
            places = [METHODS.index(row["method"]) + shift for row in mine]
            means, ranges = ([value[i] for value in values] for i in (0, 1))
            axis.errorbar(places, means, ranges, fmt="o", color=colour, label=label, capsize=4)
        for row in rows:
            if row["side"] in ("raw pixels", "supervised"):
                height = float(row["knn20"].split()[0])
                axis.axhline(height, color="grey", linewidth=1, linestyle=":")
                axis.text(-0.45, height, row["side"], fontsize=7, va="bottom")
        axis.set_xticks(range(len(METHODS)), ["SimCLR", "DINO", "MAE (mean patch token)"], fontsize=8)
        axis.set_xlim(-0.5, 2.5)
        axis.set_title(dataset, fontsize=10)
        axis.set_ylabel("kNN-20, %")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--tune", action="store_true", help="measure on a sixth of the training images")
    mode.add_argument("--final", action="store_true", help="measure on the test images")
    parser.add_argument("--budget", type=float, default=400.0, help="CPU seconds a run")
    parser.add_argument("--datasets", nargs="+", choices=list(LABEL), default=["fashion-mnist"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--side", nargs="+", choices=("ours", "lightly"), default=("ours", "lightly"))
    parser.add_argument("--baselines", action="store_true", help="raw pixels, untrained, supervised as well")
    parser.add_argument("--json", type=Path, help="rows are added as they come; what it holds is not run again")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--set", nargs=argparse.REMAINDER, default=[], help="last: --name value of either side")
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    bench = Bench(args)
    for name in args.datasets:
        data = Data.load(name, args.final)
        if args.baselines:
            bench.run(data, "simclr", "raw pixels", 0)
            bench.run(data, "simclr", "supervised", 0)
            for method in args.methods:
                bench.run(data, method, "untrained", 0)
        for seed in args.seeds:
            for method in args.methods:
                for side in args.side:
                    bench.run(data, method, side, seed)
    table = bench.table()
    print(format_table(table))
    if args.picture:
        draw(table, args.picture)


if __name__ == "__main__":
    main()
