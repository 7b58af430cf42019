"""Every joint-embedding method in the same CPU time on the same backbone: emoji and Fashion-MNIST.

    python recipes/benchmarks/leaderboard.py --jobs 2 --json board.jsonl --picture board.png     # goes on where it was
    python recipes/benchmarks/leaderboard.py --tune --methods byol --set --learning_rate 0.001

Each method trains by its own recipe (recipes/<method>_emoji.yaml) through the code of ``hf-ssl train``: its heads,
views, optimiser and batch. The backbone is one for all convolutional rows and one for all ViT rows (methods that need
patch tokens); on Fashion-MNIST the pictures' size, statistics and backbone change and colour is left alone, nothing
else. The budget is CPU time of one thread, first batch to last step, views included; schedules follow the share of it
that is spent. No labels and no test images are trained on; of Fashion-MNIST's training images IMAGES, a fixed draw,
are trained on and are the bank: methods with a row for every image would not see all 60,000 of them once. Then the
exported model, on test images: kNN-20 and linear probe (group of an emoji, class of a garment), R@1 (Google's drawing
finds Twitter's of the same emoji). Seed 0 for all, seeds 1 and 2 for the --best five; about 65 minutes on two cores.
--tune measures on a sixth of the training images, which is then not trained on, with the flags of --set.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from equal_cpu import Budget, Data, set_up

from hf_ssl.evaluation import extract_features, format_table
from hf_ssl.evaluation.evaluate import measure_features
from hf_ssl.methods import METHODS

RECIPES = Path(__file__).parents[1]
FAMILY = [name for name, (module, _) in METHODS.items() if ".joint_embedding." in module]
BUDGET = 60.0  # CPU seconds a run
IMAGES = 20_000  # trained on at most, and the bank of kNN and probe
LABEL = {"emoji:placed": "group", "fashion-mnist": "label"}
GREY = {  # what changes on Fashion-MNIST: upright grey pictures of 28 pixels
    "image_size": 28, "image_mean": [0.286], "image_std": [0.353], "hflip": 0.0, "rotation": 0, "brightness": 0.6,
    "contrast": 0.8, "saturation": 0.0, "hue": 0.0, "grayscale_p": 0.0, "solarize_p": 0.0, "blur_p": 0.0,
}  # fmt: skip
GREY_SIDE, GREY_PATCH, EMOJI = 28, 7, "emoji:placed"
SMALL = {
    "resnet": "resnet-pico", "vit": "vit-pico", "dinov2_with_registers": "dinov2-pico", "dinov3_vit": "dinov3-pico",
}  # fmt: skip


def flags_of(method: str, dataset: str) -> list[str]:
    """Flags beside the recipe's own."""
    if dataset == EMOJI:
        return ["--pixel_values", '{"scale": null}']  # the placement, drawn anew for each view, is the crop
    trainer = set_up(method, Data.load("emoji"), 0, recipe_of(method))[1]
    processor, model_type = trainer.processing_class, trainer.method.backbone.config.model_type
    unit = 8 if model_type == "resnet" else GREY_PATCH
    values: dict[str, Any] = {**GREY, "backbone": SMALL[model_type]}
    if model_type != "resnet":
        values["patch_size"] = GREY_PATCH
    side = processor.size["height"]
    for group in processor.views:  # smaller crops keep their share of the picture
        if isinstance(size := group.get("size"), int) and size != side:
            values[group["key"]] = {"size": max(unit, round(size * GREY_SIDE / side / unit) * unit)}
    return [word for name, value in values.items() for word in (f"--{name}", _word(value))]


def recipe_of(method: str) -> Path:
    return RECIPES / f"{method}_emoji.yaml"


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def measure(
    dataset: str, method: str, seed: int, budget: float, tune: bool = False, changes: Sequence[str] = ()
) -> dict[str, Any]:
    """Train, then one row of figures in per cent."""
    torch.set_num_threads(1)
    data = Data.load(dataset, final=not tune, images=IMAGES)
    flags = [*flags_of(method, dataset), *changes]
    with tempfile.TemporaryDirectory() as folder:
        trainer = set_up(method, data, seed, recipe_of(method), folder, flags)[1]
        clock = Budget(trainer, budget)
        started = time.time()
        if budget:
            trainer.add_callback(clock)
            trainer.train()
    label = LABEL[dataset]
    device = "cuda" if torch.cuda.is_available() else "cpu"  # to measure on; training is on the CPU either way
    backbone, native = trainer.method.export_backbone.eval(), trainer.processing_class.eval_processor()
    columns = (label, "code_point", "style") if dataset == EMOJI else (label,)
    bank, queries = (
        extract_features(backbone, source, native, columns=columns, device=device, progress=False)
        for source in (data.train, data.queries)
    )
    bank, queries = (dataclasses.replace(part, embeddings=part.embeddings.to(device)) for part in (bank, queries))
    row = measure_features(bank, queries, (label,), k=(20,))
    found = {"knn20": row[f"knn20_{label}"], "linear": row[f"linear_{label}"], "r1": row.get("r1")}
    return {
        "dataset": dataset, "mode": "tune" if tune else "final", "set": " ".join(changes),
        "method": method if budget else "untrained", "seed": seed, "budget": budget,
        "backbone": trainer.method.backbone.config.model_type,
        **{name: round(100 * value, 2) for name, value in found.items() if value is not None},
        "std": round(row["std"], 4), "rankme": round(row["rankme"], 1),
        "images": trainer.state.global_step * trainer.args.per_device_train_batch_size,
        "loss": next((line["loss"] for line in reversed(trainer.state.log_history) if "loss" in line), None),
        "cpu_seconds": round(clock.spent, 1), "wall_seconds": round(time.time() - started, 1),
    }  # fmt: skip


class Board:
    """Rows in a file of JSON lines, each made by a process of its own."""

    def __init__(self, path: Path | None, jobs: int, tune: bool, changes: Sequence[str]):
        self.path, self.jobs, self.changes = path, jobs, changes
        self.mode, self.set = "tune" if tune else "final", " ".join(changes)
        self.rows: list[dict[str, Any]] = []
        if path and path.exists():
            rows = (json.loads(line) for line in path.read_text().splitlines())
            self.rows = [row for row in rows if (row["mode"], row["set"]) == (self.mode, self.set)]

    def run(self, wanted: list[tuple[str, str, int, float]]) -> None:
        known = {(row["dataset"], row["asked"], row["seed"], row["budget"]) for row in self.rows}
        missing = [one for one in wanted if one not in known]
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self._row, one): one for one in missing}
            for future in as_completed(futures):
                done, (dataset, method, seed, _) = future.result(), futures[future]
                if done.returncode:
                    print(f"{method} on {dataset}, seed {seed} FAILED: {done.stderr.strip()[-600:]}", flush=True)
                    continue
                row = json.loads(done.stdout.splitlines()[-1]) | {"asked": method}
                self.rows.append(row)
                print(json.dumps(row), flush=True)
                if self.path:
                    with self.path.open("a") as file:
                        file.write(json.dumps(row) + "\n")

    def _row(self, wanted: tuple[str, str, int, float]) -> subprocess.CompletedProcess:
        command = [sys.executable, __file__, f"--{self.mode}", "--row", *(str(word) for word in wanted)]
        return subprocess.run([*command, "--set", *self.changes], capture_output=True, text=True)

    def best(self, count: int) -> list[str]:
        """The methods of the highest kNN-20, mean over the datasets, with seed 0."""
        scores: dict[str, list[float]] = {}
        for row in self.rows:
            if row["budget"] and row["seed"] == 0:
                scores.setdefault(row["method"], []).append(row["knn20"])
        return sorted(scores, key=lambda name: -statistics.mean(scores[name]))[:count]

    def table(self) -> list[dict[str, Any]]:
        """Per method: mean over the seeds, ± half the range; the best kNN-20 first."""
        lines = []
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault((row["method"], row["backbone"]), []).append(row)
        for (method, backbone), rows in groups.items():
            line: dict[str, Any] = {"method": method, "backbone": backbone}
            for dataset in LABEL:
                mine = [row for row in rows if row["dataset"] == dataset]
                for name in ("knn20", "linear", "r1"):
                    if values := [row[name] for row in mine if name in row]:
                        spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
                        line[f"{dataset} {name}"] = f"{statistics.mean(values):.1f}{spread}"
            lines.append((statistics.mean(row["knn20"] for row in rows), line))
        return [line for _, line in sorted(lines, key=lambda pair: -pair[0])]


def draw(table: list[dict[str, Any]], budget: float, path: Path) -> None:
    """kNN-20 per method and dataset; the untrained backbones as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(LABEL), figsize=(5.2 * len(LABEL), 0.24 * len(table) + 1.2), squeeze=False)
    for axis, dataset in zip(axes[0], LABEL, strict=True):
        column = f"{dataset} knn20"
        rows = sorted((line for line in table if column in line), key=lambda line: float(line[column].split()[0]))
        trained = [line for line in rows if line["method"] != "untrained"]
        cells = [f"{line[column]} ± 0".split(" ± ") for line in trained]
        colours = ["#2a6f97" if line["backbone"] == "resnet" else "#c9a227" for line in trained]
        values, spreads = ([float(cell[i]) for cell in cells] for i in (0, 1))
        axis.barh([line["method"] for line in trained], values, xerr=spreads, color=colours, height=0.7)
        for line in (line for line in rows if line["method"] == "untrained"):
            colour = "#2a6f97" if line["backbone"] == "resnet" else "#c9a227"
            axis.axvline(float(line[column].split()[0]), color=colour, linewidth=1, linestyle=":")
        low = min([*values, *(float(line[column].split()[0]) for line in rows)])
        axis.set_xlim(max(0.0, low - 5), max(values) + 2)
        axis.set_title(f"{dataset}, kNN-20 %, {budget:g} CPU seconds", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in ("#2a6f97", "#c9a227")]
    axes[0][-1].legend(handles, ["ResNet (dotted: untrained)", "ViT"], fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=FAMILY, default=FAMILY)
    parser.add_argument("--datasets", nargs="+", choices=list(LABEL), default=list(LABEL))
    parser.add_argument("--budget", type=float, default=BUDGET, help="CPU seconds a run")
    parser.add_argument("--best", type=int, default=5, help="how many get seeds 1 and 2 as well")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    parser.add_argument("--json", type=Path, help="rows are added as they come; what it holds is not run again")
    parser.add_argument("--picture", type=Path)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--tune", action="store_true", help="measure on held-out training images")
    mode.add_argument("--final", action="store_true", help="measure on the test images (the default)")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--set", nargs=argparse.REMAINDER, default=[], help="last: --name value of hf-ssl train")
    args = parser.parse_args()
    if args.row:
        dataset, method, seed, budget = args.row
        print(json.dumps(measure(dataset, method, int(seed), float(budget), args.tune, args.set)))
        return
    board = Board(args.json, args.jobs, args.tune, args.set)
    untrained = [name for name in ("simclr", "msn", "dinov2", "dinov3") if name in args.methods]  # one a backbone
    board.run([(dataset, name, seed, 0.0) for dataset in args.datasets for name in untrained for seed in (0, 1, 2)])
    board.run([(dataset, name, 0, args.budget) for name in args.methods for dataset in args.datasets])
    chosen = [(dataset, name) for name in board.best(args.best) for dataset in args.datasets]
    board.run([(dataset, name, seed, args.budget) for seed in (1, 2) for dataset, name in chosen])
    table = board.table()
    print(format_table(table))
    if args.picture:
        draw(table, args.budget, args.picture)


if __name__ == "__main__":
    main()
