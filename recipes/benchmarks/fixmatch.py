"""FixMatch against training on the 40 labels alone: Fashion-MNIST, equal wall time, three draws of the labels.

    python recipes/benchmarks/fixmatch.py [--seeds 0 1 2] [--scratch] [--json FILE]

FixMatch starts from a SimCLR of the same images, whose time counts; ``--scratch`` leaves that out. Both chains of a
seed stand side by side, one core each, with the same network, weak views, labels, optimiser and EMA; the supervised
one is given as many steps as fill the time. Test images are looked at once, after the last step.
Time: 13 minutes a seed on 2 x86 cores. Seen (EMA weights): FixMatch .724, .758, .752, labels alone .620, .692, .638.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hf_ssl.evaluation import format_table

CLI = [sys.executable, "-m", "hf_ssl.cli"]
QUIET = ["--overwrite", "--no_evaluation", "--no_report", "--save_strategy", "no"]


def train(method: str, folder: Path, seed: int, **flags: object) -> Path:
    """A run of the command line's default recipe for Fashion-MNIST, with ``flags`` changed."""
    command = [*CLI, "train", method, "--dataset", "fashion-mnist", "--seed", str(seed), "--output_dir", str(folder)]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    with open(f"{folder}.log", "w") as log:
        code = subprocess.run([*command, *QUIET], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if code.returncode:
        raise SystemExit(f"{folder.name} failed; see {folder}.log")
    return folder


def accuracy(folder: Path) -> dict[str, float]:
    """{"EMA weights": share, "last weights": share} on the 10,000 test images."""
    rows = folder.with_suffix(".json")
    command = [*CLI, "evaluate", str(folder), "--dataset", "fashion-mnist", "--protocols", "classification"]
    subprocess.run([*command, "--json", str(rows)], check=True, capture_output=True)
    return {row["model"]: row["accuracy"] for row in json.loads(rows.read_text()) if "weights" in row["model"]}


def fixmatch(folder: Path, seed: int, args: argparse.Namespace) -> tuple[Path, float]:
    """(run, minutes)."""
    begin, flags = time.time(), {"max_steps": args.steps}
    if not args.scratch:
        start = train("simclr", folder / f"simclr-{seed}", seed, max_steps=args.simclr_steps)
        flags |= {"backbone": start, "learning_rate": 0.01}  # .03 would wash the features out
    return train("fixmatch", folder / f"fixmatch-{seed}", seed, **flags), (time.time() - begin) / 60


def supervised(folder: Path, seed: int, args: argparse.Namespace) -> tuple[Path, float]:
    begin = time.time()
    flags = {"unlabeled_ratio": 0, "per_device_train_batch_size": 64, "max_steps": args.supervised_steps}
    return train("fixmatch", folder / f"supervised-{seed}", seed, **flags), (time.time() - begin) / 60


def compare(seed: int, folder: Path, args: argparse.Namespace) -> list[dict]:
    """Both chains of a seed, side by side, each on cores of its own where there are two."""
    with ThreadPoolExecutor(2) as pool:
        chains = {"FixMatch": pool.submit(fixmatch, folder, seed, args)}
        chains["supervised"] = pool.submit(supervised, folder, seed, args)
        done = {name: chain.result() for name, chain in chains.items()}
    rows = []
    for name, (run, minutes) in done.items():
        found = accuracy(run)
        rows.append({"seed": seed, "run": name, "minutes": minutes, "accuracy": found["EMA weights"]})
        rows[-1]["last weights"] = found["last weights"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--simclr_steps", type=int, default=1600)
    parser.add_argument("--supervised_steps", type=int, default=25000)
    parser.add_argument("--scratch", action="store_true", help="FixMatch from random weights, learning rate .03")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for seed in args.seeds:
        rows += compare(seed, folder, args)
        print(format_table(rows), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2))
    mean = {
        name: statistics.mean(r["accuracy"] for r in rows if r["run"] == name) for name in ("FixMatch", "supervised")
    }
    gap = 100 * (mean["FixMatch"] - mean["supervised"])
    print(f"FixMatch {mean['FixMatch']:.3f}, supervised {mean['supervised']:.3f}: {gap:+.1f}")


if __name__ == "__main__":
    main()
