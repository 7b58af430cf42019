"""The stream of undecoded rows side by side: hf_ssl, datasets streaming, webdataset, and pyarrow alone.

    python recipes/benchmarks/stream.py                   # 16,000 rows of 20 kB, 10 passes: 3 minutes, 320 MB of disk
    python recipes/benchmarks/stream.py --rows 4000 --passes 3

Random bytes of a JPEG's size in four parquet files; shuffled, one process, nothing decoded. CPU time and wall time per
row of one pass, in turns, medians over the passes; the longest wait for one row; the growth of resident memory from
the end of the second pass (after the first, buffers are filled) to the end of the last one. `datasets` shuffles with
the same buffer as ours; at the end of each pass it waits for its threads. A peer that is not installed is left out.
"""

import argparse
import io
import itertools
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy as np
import pyarrow.parquet as pq
from bars import draw

from hf_ssl.data import load_source
from hf_ssl.data.stream import RowStream

FILES, BYTES, BATCH, BUFFER = 4, 20_000, 32, 2048


def write(folder: Path, rows: int) -> None:
    rng, each = np.random.default_rng(0), rows // FILES
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    for number in range(FILES):
        images = [{"bytes": rng.bytes(BYTES), "path": f"{number}-{i}.jpg"} for i in range(each)]
        part = datasets.Dataset.from_dict({"image": images, "label": list(range(each))}, features=features)
        part.to_parquet(str(folder / f"{number}.parquet"), batch_size=250)
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for i, image in enumerate(images):
                info = tarfile.TarInfo(f"{number}-{i}.jpg")
                info.size = BYTES
                tar.addfile(info, io.BytesIO(image["bytes"]))


def plain(files: list[str]) -> Iterator[dict]:
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(256, use_threads=False):
                yield from batch.to_pylist()


def paths(folder: Path) -> dict[str, Iterator[dict] | str]:
    """Endless rows of every side."""

    def again(rows: Iterable[dict]) -> Iterator[dict]:
        while True:
            yield from rows

    spec = str(folder / "*.parquet")
    files = sorted(str(file) for file in folder.glob("*.parquet"))
    mapped, streamed = load_source(spec), load_source(spec, streaming=True)
    peer = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    peer = peer.cast_column("image", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=BUFFER)
    found: dict[str, Iterator[dict] | str] = {
        "hf_ssl, any row": iter(RowStream(mapped, BATCH)),
        "hf_ssl, streamed": iter(RowStream(streamed, BATCH, shuffle_buffer=BUFFER)),
        "datasets streaming": again(peer),
    }
    try:
        import webdataset

        tars = sorted(str(file) for file in folder.glob("*.tar"))
        found["webdataset"] = again(webdataset.WebDataset(tars, shardshuffle=FILES).shuffle(BUFFER))
    except ImportError as error:
        found["webdataset"] = f"not measured: {error}"
    found["pyarrow alone, in order"] = (row for _ in itertools.count() for row in plain(files))
    return found


def resident() -> float:
    """Memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def take(rows: Iterator[dict], count: int) -> dict[str, float]:
    """`count` rows: milliseconds per row, and of the slowest one."""
    wall, cpu, slowest = time.perf_counter(), time.process_time(), 0.0
    last = wall
    for _ in itertools.islice(rows, count):
        now = time.perf_counter()
        slowest, last = max(slowest, now - last), now
    return {
        "cpu": 1000 * (time.process_time() - cpu) / count,
        "wall": 1000 * (time.perf_counter() - wall) / count,
        "slowest": 1000 * slowest,
    }


def measure(found: dict[str, Iterator[dict] | str], rows: int, passes: int) -> list[dict]:
    sides = {name: side for name, side in found.items() if not isinstance(side, str)}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(passes + 1):
        for name, side in sides.items():
            seen[name].append(take(side, rows))
    result: list[dict] = []
    base = float(np.median([one["cpu"] for one in seen["datasets streaming"][1:]]))
    for name, side in found.items():
        if isinstance(side, str):
            result.append({"path": name, "note": side})
            continue
        cpu = [one["cpu"] for one in seen[name][1:]]  # the first pass fills buffers and the disk's cache
        wall = [one["wall"] for one in seen[name][1:]]
        result.append({
            "path": name, "cpu ms": float(np.median(cpu)), "low": min(cpu), "high": max(cpu),
            "wall ms": float(np.median(wall)), "times as fast": base / float(np.median(cpu)),
            "longest wait ms": max(one["slowest"] for one in seen[name][1:]),
        })  # fmt: skip
    return result


def growth(folder: Path, streaming: bool, rows: int, passes: int) -> float:
    """Resident memory after the last pass over that after the second, minus 1."""
    stream = iter(RowStream(load_source(str(folder / "*.parquet"), streaming=streaming), BATCH, shuffle_buffer=BUFFER))
    marks = []
    for _ in range(max(passes, 3)):
        take(stream, rows)
        marks.append(resident())
    return marks[-1] / marks[1] - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_000)
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        datasets.disable_progress_bars()
        write(folder, options.rows)
        grown = {kind: growth(folder, kind == "streamed", options.rows, options.passes)
                 for kind in ("any row", "streamed")}  # fmt: skip
        rows = measure(paths(folder), options.rows, max(5, options.passes // 2))
        print(
            f"{options.rows} rows of {BYTES} bytes, shuffled, one process, load {os.getloadavg()[0]:.1f}; ms per row"
        )
        for row in rows:
            if "note" in row:
                print(f"  {row['path']:24s} {row['note']}")
                continue
            print(f"  {row['path']:24s} cpu {row['cpu ms']:.4f} ({row['low']:.4f}-{row['high']:.4f})   "
                  f"{row['times as fast']:5.2f} x   wall {row['wall ms']:.4f}   "
                  f"longest wait {row['longest wait ms']:.0f} ms")  # fmt: skip
        for kind, share in grown.items():
            print(f"  memory over {options.passes} passes, {kind}: {100 * share:+.2f} %")
        result = {"rows": rows, "growth": grown, "load": os.getloadavg()[0], "passes": options.passes}
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if options.picture:
            timed = [row for row in rows if "cpu ms" in row]
            draw(
                timed,
                "cpu ms",
                [f"{row['cpu ms']:.3f}" for row in timed],
                "CPU milliseconds per undecoded row (shorter is better)",
                options.picture,
            )


if __name__ == "__main__":
    main()
