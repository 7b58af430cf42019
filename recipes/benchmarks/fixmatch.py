"""FixMatch against training on the 40 labels alone: Fashion-MNIST, equal wall time, three draws of the labels.

    python recipes/benchmarks/fixmatch.py [--seeds 0 1 2] [--steps 6000] [--json FILE]

Time: about 12 minutes a seed on 2 x86 cores. Both runs of a seed stand side by side on the same cores, with the same
network, weak views, labels, optimiser and EMA; the supervised one is given as many steps as fill the time. Test
images are looked at once, after the last step. Seen: FixMatch .686, .754, .709, labels alone .651, .681, .695: +4.0.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hf_ssl.evaluation import format_table

SUPERVISED = {  # strength of the labelled views -> extra flags; the paper's labelled views are weak
    "supervised": [],
    "supervised, strong views": ["--pixel_values", '{"randaugment": 2, "cutout": 0.5}'],
}


def start(folder: Path, seed: int, *flags: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "hf_ssl.cli",
        "train",
        "fixmatch",
        "--dataset",
        "fashion-mnist",
        "--seed",
        str(seed),
    ]
    command += ["--output_dir", str(folder), "--overwrite", "--no_evaluation", "--no_report", "--save_strategy", "no"]
    log = open(f"{folder}.log", "w")  # noqa: SIM115 - the child writes to it until it ends
    return subprocess.Popen([*command, *flags], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def accuracy(folder: Path) -> dict[str, float]:
    """{"EMA weights": share, "last weights": share} on the 10,000 test images."""
    rows = folder.with_suffix(".json")
    command = [sys.executable, "-m", "hf_ssl.cli", "evaluate", str(folder), "--dataset", "fashion-mnist"]
    subprocess.run([*command, "--protocols", "classification", "--json", str(rows)], check=True, capture_output=True)
    return {row["model"]: row["accuracy"] for row in json.loads(rows.read_text()) if "weights" in row["model"]}


def compare(seed: int, steps: int, supervised_steps: int, names: list[str], folder: Path) -> list[dict]:
    """Both runs of a seed, side by side."""
    flags = ["--unlabeled_ratio", "0", "--per_device_train_batch_size", "64", "--max_steps", str(supervised_steps)]
    begin = time.time()
    runs = {"FixMatch": start(folder / f"fixmatch-{seed}", seed, "--max_steps", str(steps))}
    for name in names:
        own = name.replace(", ", "-").replace(" ", "-")
        runs[name] = start(folder / f"{own}-{seed}", seed, *flags, *SUPERVISED[name])
    minutes: dict[str, float] = {}
    while len(minutes) < len(runs):
        time.sleep(0.5)
        for name, run in runs.items():
            if run.poll() is not None and name not in minutes:
                minutes[name] = (time.time() - begin) / 60
    rows = []
    for name, run in runs.items():
        where = Path(run.args[run.args.index("--output_dir") + 1])  # type: ignore[union-attr, index]
        if run.returncode:
            raise SystemExit(f"{name}, seed {seed} failed; see {where}.log")
        found = accuracy(where)
        rows.append({"seed": seed, "run": name, "minutes": minutes[name], "accuracy": found["EMA weights"]})
        rows[-1]["last weights"] = found["last weights"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--supervised_steps", type=int, default=14000)
    parser.add_argument("--strong", action="store_true", help="a second baseline, strong labelled views")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    names = list(SUPERVISED)[: 2 if args.strong else 1]
    rows: list[dict] = []
    for seed in args.seeds:
        rows += compare(seed, args.steps, args.supervised_steps, names, folder)
        print(format_table(rows), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2))
    mean = {name: statistics.mean(r["accuracy"] for r in rows if r["run"] == name) for name in ("FixMatch", *names)}
    for name in names:
        print(
            f"FixMatch {mean['FixMatch']:.3f}, {name} {mean[name]:.3f}: {100 * (mean['FixMatch'] - mean[name]):+.1f}"
        )


if __name__ == "__main__":
    main()
