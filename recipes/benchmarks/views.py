"""Views per picture side by side with peers, one thread: SimCLR 2x224, DINO 2x224 + 8x96, SimCLR 2x32.

    python recipes/benchmarks/views.py [--rounds 7] [--json FILE] [--picture FILE]

About 60 seconds on an idle core; the lightly rows and the picture need: pip install '.[bench]'.

From the bytes of JPEG photos (500x375) and from arrays. Ours is what a worker does, `ViewCollator` on a batch of rows
(reading, seeding, all views, written into the batch), "uint8" as handed over and "float" with `prepare`, which
normalises the batch and which otherwise runs on the device. The peers' results are normalised floats, so the ratios
are to "float"; stacking their pictures into a batch is not counted. The limit is decoding alone (or nothing, from
arrays) and one copy of the views. CPU time of the thread; the paths take turns batch by batch in random order;
medians over rounds, and the least and the most. Read the ratios: they move less than the times do.
"""

import argparse
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import datasets
import matplotlib
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from hf_ssl.data import ImageSource, ViewCollator
from hf_ssl.data.decode import decode_image
from hf_ssl.processing import SSLImageProcessor

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIMCLR: dict[str, Any] = {
    "count": 2, "hflip": 0.5, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "jitter_p": 0.8,
    "grayscale_p": 0.2, "blur_p": 0.5, "blur_kernel": 0.1,
}  # fmt: skip
SMALL: dict[str, Any] = {name: value for name, value in SIMCLR.items() if not name.startswith("blur")}
BYOL: dict[str, Any] = {
    **SIMCLR, "count": 1, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "blur_kernel": 0.0,
}  # fmt: skip
DINO: list[dict[str, Any]] = [
    {**BYOL, "scale": [0.4, 1.0], "blur_p": 1.0},
    {**BYOL, "scale": [0.4, 1.0], "blur_p": 0.1, "solarize_p": 0.2},
    {**BYOL, "key": "local", "count": 8, "size": 96, "scale": [0.05, 0.4]},
]
LIGHTLY = {
    "SimCLR": ("SimCLRTransform", {"input_size": 224}),
    "DINO": ("DINOTransform", {"n_local_views": 8}),
    "small": ("SimCLRTransform", {"input_size": 32, "gaussian_blur": 0.0}),
}
Path_ = Callable[[list[Any]], object]  # works off a batch: JPEG bytes or uint8 (H, W, C) arrays


def ours(groups: list[dict[str, Any]], size: int, normalised: bool) -> Path_:
    processor = SSLImageProcessor(views=groups, size=size)
    source = ImageSource("pictures", datasets.Dataset.from_dict({"image": []}))
    collate = ViewCollator(source, processor, seed=0)
    calls = iter(range(10**9))

    def run(pictures: list[Any]) -> object:
        epoch = next(calls)
        images = [{"bytes": p, "path": None} if isinstance(p, bytes) else p for p in pictures]
        batch = collate([{"image": image, "_epoch": epoch, "_index": i} for i, image in enumerate(images)])
        return processor.prepare(batch) if normalised else batch

    return run


def opened(picture: Any) -> Image.Image:
    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else Image.fromarray(picture)
    return image.convert("RGB")


def torchvision_views(groups: list[dict[str, Any]], size: int, as_tensor: bool) -> Path_:
    views = []
    for fields in groups:
        side = fields.get("size", size)
        jitter = v2.ColorJitter(fields["brightness"], fields["contrast"], fields["saturation"], fields["hue"])
        blur = v2.GaussianBlur(max(int(side * 0.1) // 2 * 2 + 1, 3), (0.1, 2.0))
        scale = tuple(fields.get("scale", [0.08, 1.0]))
        steps = [
            v2.RandomResizedCrop(side, scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(), v2.RandomApply([jitter], fields["jitter_p"]),
            v2.RandomGrayscale(fields["grayscale_p"]), v2.RandomApply([blur], fields.get("blur_p", 0.0)),
            v2.RandomSolarize(128, fields.get("solarize_p", 0.0)),
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ]  # fmt: skip
        views += [v2.Compose(steps)] * fields["count"]
    first = v2.PILToTensor() if as_tensor else v2.Identity()

    def one(picture: Any) -> object:
        image = first(opened(picture))
        return [view(image) for view in views]

    return lambda pictures: [one(picture) for picture in pictures]


def lightly_views(recipe: str) -> Path_ | str:
    try:
        from lightly import transforms
    except ImportError as error:
        return f"not measured: lightly does not import ({error})"
    name, arguments = LIGHTLY[recipe]
    transform = getattr(transforms, name)(**arguments)
    return lambda pictures: [transform(opened(picture)) for picture in pictures]


def limit(groups: list[dict[str, Any]], size: int) -> Path_:
    views = np.zeros(sum(group["count"] * group.get("size", size) ** 2 for group in groups) * 3, np.uint8)

    def one(picture: Any) -> object:
        if isinstance(picture, bytes):
            decode_image(picture)
        return views.copy()

    return lambda pictures: [one(picture) for picture in pictures]


def measure(paths: dict[str, Path_ | str], pictures: list[Any], rounds: int) -> dict[str, Any]:
    """{path: milliseconds per picture of each round, or why there are none}. One more round comes first."""
    times: dict[str, Any] = {name: [] if callable(path) else path for name, path in paths.items()}
    names = [name for name, path in paths.items() if callable(path)]
    order = np.random.default_rng(0)  # who runs after whom must not favour anyone: caches are warm or cold by it
    for turn in range(rounds + 1):
        for name in order.permutation(names).tolist():
            start = time.thread_time()
            paths[name](pictures)  # type: ignore[operator]
            if turn:
                times[name].append(1000 * (time.thread_time() - start) / len(pictures))
    return times


def show(title: str, times: dict[str, Any]) -> dict[str, Any]:
    print(title)
    base, rows = float(np.median(times["hf_ssl, float"])), {}
    for name, values in times.items():
        if isinstance(values, str):
            print(f"  {name:24s} {values}")
            rows[name] = values
            continue
        low, median, high = min(values), float(np.median(values)), max(values)
        print(f"  {name:24s} {median:8.3f} ms  {median / base:6.2f} x   ({low:.3f}-{high:.3f})", flush=True)
        rows[name] = {"ms": median, "low": low, "high": high, "to_ours": median / base}
    return rows


def workloads(count: int) -> dict[str, tuple[str, list[dict[str, Any]], int, list[Any]]]:
    """title -> (recipe, groups, size, pictures)"""
    photo = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    crops = [photo.crop((3 * i, 25 * i, 3 * i + 500, 25 * i + 375)) for i in range(4)]
    files = []
    for crop in crops:
        crop.save(file := io.BytesIO(), "JPEG", quality=90)
        files.append(file.getvalue())
    arrays = [np.array(crop) for crop in crops]
    grey = [np.array(crop.convert("L").resize((28, 28))) for crop in crops]
    colour = [np.array(crop.resize((32, 32))) for crop in crops]
    pngs = []
    for picture in colour:
        Image.fromarray(picture).save(file := io.BytesIO(), "PNG")
        pngs.append(file.getvalue())
    return {
        "SimCLR 2x224 from JPEG": ("SimCLR", [SIMCLR], 224, files * (count // 4)),
        "SimCLR 2x224 from arrays": ("SimCLR", [SIMCLR], 224, arrays * (count // 4)),
        "DINO 2x224 + 8x96 from JPEG": ("DINO", DINO, 224, files * (count // 8)),
        "DINO 2x224 + 8x96 from arrays": ("DINO", DINO, 224, arrays * (count // 8)),
        "SimCLR 2x32 from 28x28 grey arrays": ("small", [SMALL], 32, grey * count),
        "SimCLR 2x32 from 32x32 RGB arrays": ("small", [SMALL], 32, colour * count),
        "SimCLR 2x32 from 32x32 RGB PNG": ("small", [SMALL], 32, pngs * count),
    }


def draw_bars(results: dict[str, dict[str, Any]], file: str) -> None:
    """Speed relative to lightly (to torchvision where lightly is missing), one group of bars per workload."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["torchvision v2, PIL", "torchvision v2, tensors", "lightly", "hf_ssl, float", "hf_ssl, uint8"]
    figure, axes = plt.subplots(figsize=(9, 0.75 * len(results) + 1.2), layout="constrained")
    for i, name in enumerate(names):
        places, speeds = [], []
        for place, rows in enumerate(results.values()):
            peer = rows["lightly"] if isinstance(rows["lightly"], dict) else rows[names[0]]
            if isinstance(rows[name], dict):
                places.append(place + 0.16 * (i - 2))
                speeds.append(peer["ms"] / rows[name]["ms"])
        bars = axes.barh(
            places, speeds, 0.15, label=name, color=["#c7cdd4", "#9aa5b1", "#5b7a99", "#2f9e6e", "#8ed1b1"][i]
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set_xlabel("pictures per second of one thread, relative to lightly")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=5)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Views per picture side by side with peers, one thread.")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count; medians over them")
    parser.add_argument("--batch", type=int, default=16, help="pictures per turn at 224 pixels, a multiple of 8")
    parser.add_argument("--only", default="", help="workloads whose title contains this")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--picture", help="file for a bar chart")
    arguments = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    load, results = os.getloadavg()[0], {}
    print(f"one thread, load average {load:.1f} on {os.cpu_count()} cores, {arguments.rounds} rounds")
    for title, (recipe, groups, size, pictures) in workloads(arguments.batch).items():
        if arguments.only not in title:
            continue
        paths: dict[str, Path_ | str] = {
            "hf_ssl, float": ours(groups, size, True),
            "hf_ssl, uint8": ours(groups, size, False),
            "lightly": lightly_views(recipe),
            "torchvision v2, PIL": torchvision_views(groups, size, False),
            "torchvision v2, tensors": torchvision_views(groups, size, True),
            "limit": limit(groups, size),
        }
        results[title] = show(title, measure(paths, pictures, arguments.rounds))
    if arguments.json:
        about = {"load": load, "cores": os.cpu_count(), "threads": 1, "rounds": arguments.rounds}
        Path(arguments.json).write_text(json.dumps({**about, "workloads": results}, indent=1))
    if arguments.picture:
        draw_bars(results, arguments.picture)


if __name__ == "__main__":
    main()
