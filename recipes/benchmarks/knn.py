"""kNN side by side: hf_ssl exact and bf16, lightly's knn_predict, faiss, and the matrix product alone.

    python recipes/benchmarks/knn.py                      # 10,000 queries, 60,000 x 384 bank, one thread: 3 minutes
    python recipes/benchmarks/knn.py --queries 2000       # 1 minute
    python recipes/benchmarks/knn.py --large              # 1.28 M x 768 bank, its memory alone: 3 minutes, 6 GB

k 200, temperature .1 for all, from features to predictions: lightly as its KNNClassifier does it, normalised features
in batches of 256. The sides take turns; medians of the CPU time, the whole range beside them. Read the ratios. A peer
that is not installed is left out and named (pip install '.[bench]', faiss-cpu).
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from bars import draw

from hf_ssl.evaluation import knn_accuracy, nearest

K, TEMPERATURE, CLASSES = 200, 0.1, 100
Side = Callable[[], torch.Tensor | None]


def data(rows: int, dim: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of CLASSES overlapping classes, of which kNN names about three in four correctly, and their labels."""
    centres = 0.2 * torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    return torch.randn(rows, dim, generator=generator).add_(centres[labels]), labels


def vote(similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The class with the largest sum of exp(similarity / temperature): (M, K) twice -> (M,)."""
    votes = torch.zeros(len(similarity), CLASSES).scatter_add_(1, labels, (similarity / TEMPERATURE).exp())
    return votes.argmax(dim=1)


def paths(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor) -> dict[str, Side | str]:
    def ours(precision: str) -> torch.Tensor:
        similarity, rows = nearest(queries, bank, K, precision)
        return vote(similarity, labels[rows])

    def product(dtype: torch.dtype) -> None:
        low = bank.to(dtype)
        for chunk in queries.to(dtype).split(256):
            chunk @ low.T

    found: dict[str, Side | str] = {"hf_ssl": lambda: ours("fp32"), "hf_ssl bf16": lambda: ours("bf16")}
    try:
        from lightly.utils.benchmarking.knn import knn_predict

        unit, columns = F.normalize(queries, dim=1), F.normalize(bank, dim=1).T.contiguous()
        found["lightly knn_predict"] = lambda: torch.cat(
            [knn_predict(chunk, columns, labels, CLASSES, K, TEMPERATURE)[:, 0] for chunk in unit.split(256)]
        )
    except ImportError as error:
        found["lightly knn_predict"] = f"not measured: {error}"
    try:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(bank.shape[1])
        index.add(F.normalize(bank, dim=1).numpy())

        def flat() -> torch.Tensor:
            similarity, rows = index.search(F.normalize(queries, dim=1).numpy(), K)
            return vote(torch.from_numpy(similarity), labels[torch.from_numpy(rows)])

        found["faiss flat"] = flat
    except ImportError as error:
        found["faiss flat"] = f"not measured: {error}"
    found["product alone, fp32"] = lambda: product(torch.float32)
    found["product alone, bf16"] = lambda: product(torch.bfloat16)
    return found


def measure(found: dict[str, Side | str], rounds: int) -> list[dict]:
    times: dict[str, list[float]] = {name: [] for name, path in found.items() if callable(path)}
    predicted: dict[str, torch.Tensor | None] = {}
    for _ in range(rounds):
        for name in times:
            start = time.process_time()
            predicted[name] = found[name]()  # type: ignore[operator]
            times[name].append(time.process_time() - start)
    rows = []
    base = np.median(times["lightly knn_predict"] if "lightly knn_predict" in times else times["hf_ssl"])
    exact = predicted["hf_ssl"]
    for name, path in found.items():
        row: dict = {"path": name}
        if isinstance(path, str):
            row["note"] = path
        else:
            row |= {"seconds": float(np.median(times[name])), "low": min(times[name]), "high": max(times[name])}
            row["times as fast"] = float(base / row["seconds"])
            if (labels := predicted[name]) is not None and exact is not None:
                row["same predictions"] = float((labels == exact).double().mean())
        rows.append(row)
    return rows


def status(name: str) -> float:
    """A line of /proc/self/status in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e6


def large(queries: int) -> dict:
    """Peak memory of the whole process with an ImageNet-sized bank (the bank itself holds 3.93 GB)."""
    generator = torch.Generator().manual_seed(0)
    bank, labels = torch.empty(1_281_167, 768), torch.arange(1_281_167) % 1000
    for part in bank.split(2**16):
        part.normal_(generator=generator)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.process_time()
    score = knn_accuracy(bank, labels, bank[:queries].clone(), labels[:queries], k=K, num_classes=1000)
    return {"queries": queries, "peak GB": status("VmHWM"), "seconds": time.process_time() - start, **score}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--bank", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="only the memory of a 1.28 M x 768 bank")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    about = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], "k": K, "temperature": TEMPERATURE}
    if options.large:
        result: dict = {**about, **large(min(options.queries, 512))}
        print("\n".join(f"{name:14s} {value}" for name, value in result.items()))
    else:
        generator = torch.Generator().manual_seed(0)
        bank, labels = data(options.bank, options.dim, generator)
        queries, _ = data(options.queries, options.dim, generator)
        rows = measure(paths(bank, labels, queries), options.rounds)
        result = {**about, "queries": options.queries, "bank": list(bank.shape), "rows": rows}
        print(f"{options.queries} queries, bank {options.bank} x {options.dim}, {about['threads']} thread(s), load "
              f"{about['load']:.1f}, median of {options.rounds}")  # fmt: skip
        for row in rows:
            if "note" in row:
                print(f"  {row['path']:22s} {row['note']}")
                continue
            same = f"   {100 * row['same predictions']:6.2f} % same" if "same predictions" in row else ""
            print(f"  {row['path']:22s} {row['seconds']:7.2f} s   {row['times as fast']:5.2f} x   "
                  f"({row['low']:.2f}-{row['high']:.2f}){same}")  # fmt: skip
        if options.picture:
            timed = [row for row in rows if "seconds" in row]
            draw(
                timed,
                "seconds",
                [f"{row['times as fast']:.2f} x" for row in timed],
                "CPU seconds, one run (shorter is better)",
                options.picture,
            )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
