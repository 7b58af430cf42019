"""Time per picture of one thread, side by side with peers: SimCLR 2x224, DINO 2x224 + 8x96, SimCLR 2x32.

    python recipes/benchmarks/views.py        # about 20 seconds; the lightly rows need: pip install '.[bench]'

Decoded uint8 pictures in (500x375, or 64x64 for the last),
normalised float32 (V, C, H, W) out. The paths take turns picture by picture;
medians over rounds of the mean CPU time per picture. Read the ratios: they move less than the times do.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import matplotlib
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from hf_ssl.processing import SSLImageProcessor

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIMCLR = {
    "hflip": 0.5, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "jitter_p": 0.8,
    "grayscale_p": 0.2, "blur_p": 0.5, "blur_kernel": 0.1,
}  # fmt: skip
BYOL = {**SIMCLR, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "blur_kernel": 0.0}
DINO = [
    {"scale": [0.4, 1.0], **BYOL, "blur_p": 1.0},
    {"scale": [0.4, 1.0], **BYOL, "blur_p": 0.1, "solarize_p": 0.2},
    {"key": "local", "count": 8, "size": 96, "scale": [0.05, 0.4], **BYOL},
]
Draw = Callable[[np.ndarray], object]


def ours(processor: SSLImageProcessor) -> Draw:
    rng = np.random.default_rng(0)
    return lambda image: processor.draw([image] * processor.num_views, rng)


def torchvision_view(size: int, scale: list[float], fields: dict[str, float]) -> v2.Compose:
    jitter = v2.ColorJitter(fields["brightness"], fields["contrast"], fields["saturation"], fields["hue"])
    kernel = max(int(size * 0.1) // 2 * 2 + 1, 3)
    steps = [
        v2.RandomResizedCrop(size, tuple(scale), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(), v2.RandomApply([jitter], fields["jitter_p"]),
        v2.RandomGrayscale(fields["grayscale_p"]),
        v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], fields["blur_p"]),
        v2.RandomSolarize(128, fields.get("solarize_p", 0.0)),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
    ]  # fmt: skip
    return v2.Compose(steps)


def torchvision_pil(groups: list[dict], size: int) -> Draw:
    views = [
        torchvision_view(group.get("size", size), group.get("scale", [0.08, 1.0]), group)
        for group in groups
        for _ in range(group.get("count", 1))
    ]

    def draw(image: np.ndarray) -> object:
        picture = Image.fromarray(image)
        return [view(picture) for view in views]

    return draw


def lightly_path(name: str, **arguments: object) -> Draw | str:
    try:
        from lightly import transforms
    except ImportError as error:
        return f"not measured: lightly does not import ({error})"
    transform = getattr(transforms, name)(**arguments)
    return lambda image: transform(Image.fromarray(image))


def measure(paths: dict[str, Draw | str], images: list[np.ndarray], rounds: int = 7) -> None:
    """Prints each path's median milliseconds per picture over interleaved `rounds`, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name, path in paths.items() if callable(path)}
    for i in range(rounds + 1):
        spent = dict.fromkeys(times, 0.0)
        for image in images:
            for name in spent:
                start = time.thread_time()
                paths[name](image)  # type: ignore[operator]
                spent[name] += time.thread_time() - start
        for name, seconds in spent.items():
            if i:
                times[name].append(1000 * seconds / len(images))
    first = float(np.median(next(iter(times.values()))))
    for name, path in paths.items():
        if name not in times:
            print(f"  {name:28s} {path}")
            continue
        median = float(np.median(times[name]))
        spread = f"({min(times[name]):.3f}-{max(times[name]):.3f})"
        print(f"  {name:28s} {median:8.3f} ms   {median / first:6.1f} x   {spread}")


def main() -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    photo = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    photos = [np.asarray(photo.crop((6 * i, 30 * i, 6 * i + 500, 30 * i + 375))) for i in range(2)] * 8
    small = [np.asarray(Image.fromarray(image).resize((64, 64))) for image in photos] * 4
    rest = {k: v for k, v in SIMCLR.items() if not k.startswith("blur")}

    print("SimCLR 2x224 from 500x375")
    two = [{"count": 2, **SIMCLR}]
    measure(
        {
            "hf_ssl": ours(SSLImageProcessor(views=two)),
            "lightly SimCLRTransform": lightly_path("SimCLRTransform", input_size=224),
            "torchvision v2 (PIL)": torchvision_pil(two, 224),
        },
        photos,
    )
    print("DINO 2x224 + 8x96 from 500x375")
    measure(
        {
            "hf_ssl": ours(SSLImageProcessor(views=DINO)),
            "lightly DINOTransform": lightly_path("DINOTransform", n_local_views=8),
            "torchvision v2 (PIL)": torchvision_pil(DINO, 224),
        },
        photos[:8],
        rounds=5,
    )
    print("SimCLR 2x32 from 64x64, no blur")
    two = [{"count": 2, **rest}]
    measure(
        {
            "hf_ssl": ours(SSLImageProcessor(views=two, size=32)),
            "lightly SimCLRTransform": lightly_path("SimCLRTransform", input_size=32, gaussian_blur=0.0),
            "torchvision v2 (PIL)": torchvision_pil([{**two[0], "blur_p": 0.0}], 32),
        },
        small,
    )


if __name__ == "__main__":
    main()
