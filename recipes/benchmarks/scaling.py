"""The numbers of scaling.md: costs measured on this machine, and the tables derived from them.

    python recipes/benchmarks/scaling.py measure costs.json  # 1 minute of one core; a CUDA card's costs take 5 more
    python recipes/benchmarks/scaling.py costs.json          # the tables, at once

`measure` adds to the file what this machine can tell, so that the views of one and the card of another may be joined.
Formulas are in the code below and, in words, in scaling.md.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

PEAK = 989e12  # H100 SXM, bf16 dense, FLOP/s: NVIDIA's data sheet
UTILISATION = (0.35, 0.50)  # stated, not derived: what well-tuned training of transformers reaches
MEAN_BYTES, SHARD_BYTES, IMAGES = 110e3, 1e9, 1e9  # assumptions: ImageNet's mean JPEG; 1 GB shards; 1 B images
BACKBONES = {"ViT-S": (12, 384), "ViT-B": (12, 768), "ViT-L": (24, 1024)}  # layers, width
COLOUR = {
    "hflip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_p": 0.8,
    "grayscale_p": 0.2,
}  # fmt: skip
STRONG = {**COLOUR, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "blur_p": 0.5}
GLOBAL = {"count": 2, "scale": [0.4, 1.0], **COLOUR, "blur_p": 0.5, "solarize_p": 0.1}
LOCAL = {"key": "local", "size": 96, "scale": [0.05, 0.4], **COLOUR, "blur_p": 0.5}
VIEWS: dict[str, list[dict[str, Any]]] = {
    "2 x 224, jitter + blur": [{"count": 2, **STRONG, "blur_kernel": 0.1}],
    "2 x 224 + 6 x 96": [GLOBAL, {**LOCAL, "count": 6}],
    "2 x 224 + 8 x 96": [GLOBAL, {**LOCAL, "count": 8}],
    "1 x 224, crop + flip": [{"count": 1, "scale": [0.2, 1.0], "hflip": 0.5}],
}
METHODS = {  # method -> its views
    "SimCLR": "2 x 224, jitter + blur", "MoCo v3": "2 x 224, jitter + blur", "DINO 2+6": "2 x 224 + 6 x 96",
    "DINO 2+8": "2 x 224 + 8 x 96", "DINOv2 2+8": "2 x 224 + 8 x 96", "MAE": "1 x 224, crop + flip",
    "CLIP": "1 x 224, crop + flip",
}  # fmt: skip
BATCHES = {  # of the steps measured on a card, for S, B and L
    "backbone": (128, 128, 64), "SimCLR": (128, 128, 64), "DINO 2+8": (64, 64, 64), "MAE": (128, 128, 64)
}  # fmt: skip


def tower(layers: int, width: int, tokens: float, patch: int = 0) -> float:
    """Multiply-adds of one forward pass: 12 d^2 per token and layer, 2 T^2 d per layer, and the patch embedding."""
    return layers * (12 * width**2 * tokens + 2 * tokens**2 * width) + tokens * 3 * patch**2 * width


def dino_head(width: int) -> float:
    return width * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 65536


def multiply_adds(method: str, layers: int, width: int) -> float:
    """Per image and training step; a backward pass costs two forward passes, a teacher is forward only."""
    large, small, head = tower(layers, width, 197, 16), tower(layers, width, 37, 16), dino_head(width)
    if method == "SimCLR":
        return 3 * 2 * large
    if method == "MoCo v3":  # both views through the student and through its momentum copy
        return 3 * 2 * large + 2 * large
    if method.startswith("DINO "):
        n = int(method[-1])
        return 3 * (2 * large + n * small) + 2 * large + (3 * (2 + n) + 2) * head
    if (
        method == "DINOv2 2+8"
    ):  # patch 14; half of the images masked, 30 % of their 256 patches: 77 iBOT rows per image
        large, small, rows = tower(layers, width, 257, 14), tower(layers, width, 50, 14), 2 * 0.5 * 0.3 * 256
        return 3 * (2 * large + 8 * small) + 2 * large + (3 * (10 + rows) + 2 + rows) * head
    if method == "MAE":  # 49 visible patches and the class token, then a decoder of 8 layers and width 512
        return 3 * (tower(layers, width, 50, 16) + tower(8, 512, 197) + 197 * 512 * 768)
    return 3 * (large + tower(12, 768 if layers == 24 else 512, 77))  # CLIP: one image, one caption


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]}, {len(names)} cores"


def measure_views(rounds: int = 7) -> dict[str, Any]:
    """Milliseconds of one core per image, JPEG bytes to what the batch holds; recipes and places take turns."""
    import io

    import cv2
    import matplotlib
    import numpy as np
    import torch
    from PIL import Image

    from hf_ssl.data.decode import open_jpeg
    from hf_ssl.processing import SSLImageProcessor

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    photo = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    files = []
    for i in range(4):
        out = io.BytesIO()
        photo.crop((3 * i, 30 * i, 3 * i + 500, 30 * i + 375)).save(out, "JPEG", quality=96)
        files.append(out.getvalue())
    paths: dict[tuple[str, str], Any] = {("decode", "host"): None}
    paths.update(
        {(n, p): SSLImageProcessor(views=v, views_on=p) for n, v in VIEWS.items() for p in ("host", "device")}
    )
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in paths}
    rng = np.random.default_rng(0)
    for i in range(rounds + 1):
        for key, processor in paths.items():
            start = time.thread_time()
            for data in files * 4:
                image = open_jpeg(data)
                if processor is None:
                    image.decode()
                else:
                    processor.draw([image] * processor.num_views, rng)
            if i:
                spent[key].append(1000 * (time.thread_time() - start) / (4 * len(files)))
    result: dict[str, Any] = {"machine": machine(), "bytes": float(np.mean([len(data) for data in files])), "ms": {}}
    for (name, place), times in spent.items():
        result["ms"].setdefault(name, {})[place] = [float(np.median(times)), min(times), max(times)]
    return result


def measure_card() -> dict[str, Any]:
    """Of this CUDA card: seconds per image of `device.finish`, and FLOP/s of training steps in bf16."""
    import numpy as np
    import torch

    from hf_ssl.processing import SSLImageProcessor, device

    def seconds(step: Any, repeats: int = 10) -> float:
        for _ in range(3):
            step()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return float(np.median(times))

    result: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "finish": {}}
    batch, error, rng = 256, 0.0, np.random.default_rng(0)
    picture = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for name, views in VIEWS.items():
        processor = SSLImageProcessor(views=views, views_on="device")
        rows = [processor.draw([picture] * processor.num_views, rng) for _ in range(8)]
        found = result["finish"][name] = {"eager": 0.0, "compiled": 0.0, "first call": 0.0}
        for key in processor.model_input_names:
            one = [np.concatenate([row[k] for row in rows]) for k in (key, f"{key}_draws") if k in rows[0]]
            many = [torch.from_numpy(part).cuda().repeat(batch // 8, *[1] * (part.ndim - 1)) for part in one]
            start = time.perf_counter()
            finished = processor.normalise(*many)
            torch.cuda.synchronize()
            found["first call"] += time.perf_counter() - start
            error = max(error, float((finished.cpu() - processor.normalise(*(p.cpu() for p in many))).abs().max()))
            torch.cuda.set_sync_debug_mode("error")  # whatever waits for the card raises
            processor.normalise(*many)
            torch.cuda.set_sync_debug_mode("default")
            fast = seconds(partial(processor.normalise, *many)) / batch
            slow = partial(device._finish, *many, processor.image_mean, processor.image_std, True)
            found["compiled"] += fast
            found["eager"] += seconds(slow) / batch if len(many) == 2 else fast
        print(name, found, flush=True)
    result["largest difference from the CPU"] = error
    result["step"] = {}
    for name, (layers, width) in BACKBONES.items():
        for method, batches in BATCHES.items():
            batch = batches[list(BACKBONES).index(name)]
            step, work = training_step(method, layers, width, batch)
            torch.cuda.reset_peak_memory_stats()
            rate = batch / seconds(step)
            memory = torch.cuda.max_memory_allocated() / 1e9
            found = {"batch": batch, "images_per_s": rate, "flops": 2 * work * rate, "gb": memory}
            result["step"][f"{name} {method}"] = found
            print(name, method, found, flush=True)
            del step
            torch.cuda.empty_cache()
    return result


def training_step(method: str, layers: int, width: int, batch: int) -> tuple[Any, float]:
    """One step (forward, backward, fused AdamW, EMA) in bf16 autocast, and its multiply-adds per image."""
    import torch
    from transformers import ViTConfig, ViTModel

    from hf_ssl.methods.joint_embedding.dino import DINOConfig, DINOForPreTraining
    from hf_ssl.methods.joint_embedding.simclr import SimCLRConfig, SimCLRForPreTraining
    from hf_ssl.methods.masked.mae import MAEConfig, MAEForPreTraining

    vit = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    makers = {
        "SimCLR": lambda: SimCLRForPreTraining(SimCLRConfig(backbone_config=vit)),
        "DINO 2+8": lambda: DINOForPreTraining(DINOConfig(backbone_config=vit)),
        "MAE": lambda: MAEForPreTraining(MAEConfig(backbone_config=vit)),
    }
    model: Any = makers[method]() if method in makers else ViTModel(vit, add_pooling_layer=False)
    model = model.cuda().train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, fused=True)
    views = [torch.randn(batch, 1 if method == "MAE" else 2, 3, 224, 224, device="cuda")]
    if method == "DINO 2+8":
        views.append(torch.randn(batch, 8, 3, 96, 96, device="cuda"))
    if method not in makers:
        views = [views[0][:, 0]]

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            output = model(*views)
        (output.loss if method in makers else output.last_hidden_state[:, 0].float().square().mean()).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for student, teacher in model.teachers() if method in makers else ():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.004)

    work = multiply_adds(method, layers, width) if method in makers else 3 * tower(layers, width, 197, 16)
    return step, work


def table(title: str, columns: list[str], rows: list[list[object]]) -> None:
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(f"{x:,.3g}" if isinstance(x, float) and x < 100 else f"{x:,.0f}"
                                if isinstance(x, (int, float)) else str(x) for x in row) + " |")  # fmt: skip


def tables(costs: dict[str, Any]) -> None:
    """Prints scaling.md's tables."""
    ms, finish = costs["views"]["ms"], costs.get("card", {}).get("finish", {})
    rates, work, cores = [], [], []
    for method, views in METHODS.items():
        flops = [2 * multiply_adds(method, *shape) for shape in BACKBONES.values()]
        work.append([method, *(f / 1e9 for f in flops)])
        spans = [[share * PEAK / f for share in UTILISATION] for f in flops]
        rates.append([method, *(f"{low:,.0f}-{high:,.0f}" for low, high in spans)])
        row: list[object] = [method]
        for place in ("host", "device"):
            cost = ms[views][place][0] / 1000
            row += [1000 * cost, *(f"{low * cost:,.1f}-{high * cost:,.1f}" for low, high in spans)]
        cores.append(row)
    names = list(BACKBONES)
    table("GFLOP per image", ["method", *names], work)
    table("images/s a card needs", ["method", *names], rates)
    head = [f"{place} {x}" for place in ("host", "device") for x in ("ms/image", *names)]
    table("cores per card", ["method", *head], cores)
    rows = []
    for method, views in METHODS.items():
        hours = [IMAGES * 2 * multiply_adds(method, *shape) / PEAK / 3600 for shape in BACKBONES.values()]
        spent = [IMAGES * ms[views][place][0] / 3.6e6 for place in ("host", "device")]
        rows.append([method, *(f"{h / UTILISATION[1]:,.0f}-{h / UTILISATION[0]:,.0f}" for h in hours), *spent])
    table("per 1 B images seen", ["method", *(f"{n} GPU-hours" for n in names), "core-hours host", "device"], rows)
    rows = []
    for method in METHODS:
        per_node = [8 * UTILISATION[1] * PEAK / (2 * multiply_adds(method, *s)) for s in BACKBONES.values()]
        rows.append([method, *(f"{x:,.0f} ({x * MEAN_BYTES / 1e9:.2g} GB/s)" for x in per_node)])
    table("a node of 8 cards at 50 %: images/s (bytes/s)", ["method", *names], rows)
    total = IMAGES * MEAN_BYTES
    print(f"\n{total / 1e12:,.0f} TB, {total / SHARD_BYTES:,.0f} shards of {SHARD_BYTES / MEAN_BYTES:,.0f} images")
    rows = [[n, *(1e6 * t[k] for k in ("eager", "compiled"))] for n, t in finish.items()]
    table("finish on the card, us per image", ["views", "eager", "compiled"], rows)
    rows = []
    for name, found in costs.get("card", {}).get("step", {}).items():
        rate, method = found["images_per_s"], name.split(" ", 1)[1]
        row = [name, found["batch"], rate, 100 * found["flops"] / PEAK, found["gb"]]
        if method in METHODS:
            cost = {place: ms[METHODS[method]][place][0] / 1000 for place in ("host", "device")}
            slower = 1 / (1 / rate + finish[METHODS[method]]["compiled"])
            row += [rate * cost["host"], slower, slower * cost["device"], IMAGES / rate / 3600]
        rows.append(row + [""] * (9 - len(row)))
    head = ["step", "batch", "images/s", "% of peak", "GB", "cores, host", "images/s, device", "cores, device"]
    table("steps measured on the card", [*head, "GPU-hours per 1 B"], rows)


def main() -> None:
    path = Path(sys.argv[-1])
    if path.suffix != ".json":
        raise SystemExit(__doc__)
    costs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "measure" not in sys.argv:
        return tables(costs)
    import torch

    costs["views"] = measure_views()
    path.write_text(json.dumps(costs, indent=1))
    if torch.cuda.is_available():
        costs["card"] = {**measure_card(), "views": costs["views"]}
        path.write_text(json.dumps(costs, indent=1))


if __name__ == "__main__":
    main()
