"""One training step, side by side: hf_ssl, the peer's documented modules, and the bare backbone.

    python recipes/benchmarks/step.py [--rows NAME ...] [--rounds 5] [--memory] [--json FILE] [--picture FILE]

A step is forward, backward, the optimiser and, where there is one, the teacher's update: all that training does with a
batch that is ready. Both sides have the same optimiser class. Peers: lightly's modules as its documentation puts them
together, transformers' ViTMAEForPreTraining. "backbone" is forward and backward of our backbone alone in our precision
and memory format (DINO: the student over all crops and the teacher over the large ones), nothing else: the limit.
The sides take turns; medians of process CPU time over ROUNDS, after one round to warm up; one thread. "default
precision" is what --precision auto measures on the machine, stated with its attention. --memory: peak resident memory
of a step, each side in a process of its own. Times on two x86 cores: 2 minutes a 32x32 or B2 row, 5 to 15 the others.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ViTConfig

from hf_ssl import backbones
from hf_ssl.backbones import prepare_to_train
from hf_ssl.evaluation import format_table
from hf_ssl.methods import load
from hf_ssl.training import precision

Step = Callable[[], None]
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """method: ours. backbone: fields over its preset. peer: the name of a function of this file. ours, theirs: the
    precision of each side ("auto", "fp32", "bf16")."""

    method: str
    backbone: str
    batch: int
    size: int
    peer: str
    ours: str = "fp32"
    theirs: str = "fp32"
    target: str = ""


ROWS = {
    "simclr-r18": Row("simclr", "resnet-18", 128, 32, "lightly_simclr", "auto", target="backbone / ours >= .95"),
    "simclr-r18-fp32": Row("simclr", "resnet-18", 128, 32, "lightly_simclr", target="backbone / ours >= .95"),
    "simclr-r50": Row("simclr", "resnet-50", 16, 224, "lightly_simclr", "auto", "bf16", "1.4x peer, <= 1.25 backbone"),
    "dino-b2": Row("dino", "vit-small", 2, 224, "lightly_dino", target="1.5x peer, <= 1.15 backbone"),
    "dino-b16": Row("dino", "vit-small", 16, 224, "lightly_dino", target="1.5x peer, <= 1.15 backbone"),
    "dino-b16-auto": Row("dino", "vit-small", 16, 224, "lightly_dino", "auto", target="1.5x peer"),
    "dino-b2-bf16": Row("dino", "vit-small", 2, 224, "lightly_dino", "auto", "bf16"),
    "dino-b16-bf16": Row("dino", "vit-small", 16, 224, "lightly_dino", "auto", "bf16"),
    "mae-b4": Row("mae", "vit-base", 4, 224, "transformers_mae", target="1x peer"),
    "mae-b32": Row("mae", "vit-base", 32, 224, "transformers_mae", "auto", target="1.3x peer"),
    "mae-b32-bf16": Row("mae", "vit-base", 32, 224, "transformers_mae", "bf16", "bf16"),
}


# --- the sides -------------------------------------------------------------------------------------------------------


def native_config(row: Row) -> Any:
    fields = dict(backbones.from_preset(row.backbone))
    kind = fields.pop("model_type")
    return ResNetConfig(**fields) if kind == "resnet" else ViTConfig(**fields, image_size=row.size, patch_size=16)


def batch_of(row: Row) -> dict[str, Tensor]:
    """Views as the trainer hands them to a model: (B, V, C, H, W), in memory with the channels last."""
    generator = torch.Generator().manual_seed(0)

    def views(count: int, size: int) -> Tensor:
        return torch.randn(row.batch, count, size, size, 3, generator=generator).movedim(-1, -3)

    made = {"pixel_values": views(1 if row.method == "mae" else 2, row.size)}
    return made | ({"local_pixel_values": views(6, 96)} if row.method == "dino" else {})


def optimiser_of(row: Row, parameters: Any) -> torch.optim.Optimizer:
    """The same class for both sides: SGD for SimCLR, as lightly's documentation has it, fused AdamW for the others."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if row.method == "simclr":
        return torch.optim.SGD(trained, lr=0.06)
    return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def autocast(kind: str) -> Any:
    return torch.autocast("cpu", BF16, enabled=kind == "bf16")


def our_model(row: Row, views: dict[str, Tensor]) -> tuple[Any, str]:
    """The method as the trainer makes it ready, and the precision it trains in."""
    method = load(row.method)
    model = method(method.config_class(backbone_config=native_config(row))).train()
    prepare_to_train(model)
    sample = {name: value[: precision.ROWS] for name, value in views.items()}
    choice = precision.choose(model, sample, stated=row.ours)
    precision.apply(model, choice)
    print(choice.said, file=sys.stderr)
    return model, choice.precision


def ours(row: Row, views: dict[str, Tensor]) -> tuple[Step, str]:
    model, kind = our_model(row, views)
    model.total_steps.fill_(1000)
    optimiser = optimiser_of(row, model.parameters())

    def step() -> None:
        with autocast(kind):
            loss = model(**views).loss
        loss.backward()
        model.before_optimizer_step(0.5)
        optimiser.step()
        model.after_optimizer_step(0.5)
        optimiser.zero_grad()

    return step, label(kind, model)


def backbone(row: Row, views: dict[str, Tensor]) -> tuple[Step, str]:
    model, kind = our_model(row, views)
    student, teacher = model.backbone, getattr(model, "teacher_backbone", None)
    crops = [group.flatten(0, 1) for group in views.values()]

    def step() -> None:
        with autocast(kind):
            if row.method == "mae":
                visible = torch.rand(row.batch, (row.size // 16) ** 2).argsort(1)[:, :49]
                outputs = [backbones.visible_tokens(student, crops[0], visible)]
            else:
                outputs = [backbones.features(student, group) for group in crops]
            if teacher is not None:
                with torch.no_grad():
                    backbones.features(teacher, crops[0])
        sum(output.float().square().mean() for output in outputs).backward()
        student.zero_grad()

    return step, label(kind, model)


def label(kind: str, model: Any) -> str:
    attention = model.backbone.config._attn_implementation
    return f"{kind}, {attention}" if model.backbone.config.model_type == "vit" else kind


def lightly_simclr(row: Row, views: dict[str, Tensor]) -> tuple[Step, str]:
    """docs.lightly.ai, examples/simclr: torchvision's ResNet without its last layer, two passes."""
    import torchvision
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    network = getattr(torchvision.models, row.backbone.replace("-", ""))()
    width = network.fc.in_features
    model = nn.Sequential(*list(network.children())[:-1], nn.Flatten(), SimCLRProjectionHead(width, width, 128))
    criterion, optimiser = NTXentLoss(), optimiser_of(row, model.parameters())
    first, second = (view.contiguous() for view in views["pixel_values"].unbind(1))

    def step() -> None:
        with autocast(row.theirs):
            loss = criterion(model(first), model(second))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step, row.theirs


def lightly_dino(row: Row, views: dict[str, Tensor]) -> tuple[Step, str]:
    """docs.lightly.ai, examples/dino: a pass of backbone and head per view, update_momentum once a step."""
    import timm
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    student = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
    head = DINOProjectionHead(384, 2048, 256, 65536, freeze_last_layer=1)
    teacher, teacher_head = copy.deepcopy(student), DINOProjectionHead(384, 2048, 256, 65536)
    for frozen in (teacher, teacher_head):
        deactivate_requires_grad(frozen)
    criterion = DINOLoss(output_dim=65536, warmup_teacher_temp_epochs=5)
    optimiser = optimiser_of(row, [*student.parameters(), *head.parameters()])
    crops = [view.contiguous() for group in views.values() for view in group.unbind(1)]

    def step() -> None:
        update_momentum(student, teacher, m=0.996)
        update_momentum(head, teacher_head, m=0.996)
        with autocast(row.theirs):
            targets = [teacher_head(teacher(view).flatten(start_dim=1)) for view in crops[:2]]
            answers = [head(student(view).flatten(start_dim=1)) for view in crops]
            loss = criterion(targets, answers, epoch=5)
        loss.backward()
        head.cancel_last_layer_gradients(current_epoch=5)
        optimiser.step()
        optimiser.zero_grad()

    return step, row.theirs


def transformers_mae(row: Row, views: dict[str, Tensor]) -> tuple[Step, str]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True, image_size=row.size)).train()
    optimiser = optimiser_of(row, model.parameters())
    images = views["pixel_values"][:, 0].contiguous()

    def step() -> None:
        with autocast(row.theirs):
            loss = model(images).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step, f"{row.theirs}, {model.config._attn_implementation}"


def sides(row: Row) -> dict[str, Callable[[Row, dict[str, Tensor]], tuple[Step, str]]]:
    peer = row.peer.split("_")[0]
    return {"hf_ssl": ours, peer: globals()[row.peer], "backbone": backbone}


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(name: str, rounds: int, only: list[str]) -> dict[str, Any]:
    row = ROWS[name]
    views = batch_of(row)
    steps: dict[str, Step] = {}
    kinds: dict[str, str] = {}
    for side, make in sides(row).items():
        if side in only:
            steps[side], kinds[side] = make(row, views)
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for i in range(rounds + 1):
        for side, step in steps.items():
            start = time.process_time()
            step()
            if i:
                seconds[side].append(time.process_time() - start)
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    record: dict[str, Any] = {"row": name, "batch": row.batch, "target": row.target, "kinds": kinds}
    record["milliseconds"] = {side: round(1000 * value, 1) for side, value in medians.items()}
    record["all_milliseconds"] = {side: [round(1000 * s, 1) for s in found] for side, found in seconds.items()}
    record["load"] = round(os.getloadavg()[0], 2)
    if len(medians) == 3:
        mine, theirs, pure = medians.values()
        record |= {"peer / ours": theirs / mine, "ours / backbone": mine / pure, "backbone / ours": pure / mine}
    return record


def peak(name: str, side: str) -> dict[str, float]:
    """In this process: resident MiB before anything is built, and the peak of two steps."""
    row = ROWS[name]
    before = _status("VmRSS")
    step, _ = sides(row)[side](row, batch_of(row))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: building, and what was imported
    for _ in range(2):  # the first one makes the optimiser's state
        step()
    return {"before": before, "peak": _status("VmHWM")}


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peaks(name: str, only: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"row": name}
    for side in sides(ROWS[name]):
        if side in only:
            command = [sys.executable, __file__, "--peak", name, side]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[side] = json.loads(answer.splitlines()[-1])["peak"]
    return found


# --- showing ---------------------------------------------------------------------------------------------------------


def table(records: list[dict[str, Any]]) -> str:
    lines = []
    for record in records:
        spread = {s: f"{v:.0f} ({min(a):.0f}-{max(a):.0f})" for (s, v), a in zip(
            record["milliseconds"].items(), record["all_milliseconds"].values())}  # fmt: skip
        ratios = {k: f"{record[k]:.2f}" for k in ("peer / ours", "ours / backbone", "backbone / ours") if k in record}
        cells = {f"{side if side in ('hf_ssl', 'backbone') else 'peer'} ms": f"{text} {record['kinds'][side]}"
                 for side, text in spread.items()}  # fmt: skip
        lines.append({"row": f"{record['row']} B{record['batch']}", **cells, **ratios, "target": record["target"]})
    return format_table(lines)


def picture(records: list[dict[str, Any]], path: Path) -> None:
    """Bars per row: each side's time as a share of the peer's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"hf_ssl": "#1f77b4", "backbone": "#bbbbbb"}
    figure, axis = plt.subplots(figsize=(8, 0.7 * len(records) + 1.2), layout="constrained")
    for i, record in enumerate(records):
        times = record["milliseconds"]
        peer = next(side for side in times if side not in colours)
        for j, (side, milliseconds) in enumerate(times.items()):
            share = milliseconds / times[peer]
            axis.barh(i + 0.27 * (j - 1), share, 0.25, color=colours.get(side, "#d62728"))
            axis.text(share + 0.01, i + 0.27 * (j - 1), f"{side}, {record['kinds'][side]}", va="center", fontsize=7)
    axis.set_yticks(range(len(records)), [f"{record['row']}, B {record['batch']}" for record in records])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35)
    axis.set_xlabel("CPU time of a training step, the peer's = 1 (less is better)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--sides", nargs="+", default=["hf_ssl", "lightly", "transformers", "backbone"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak resident memory instead of time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--peak", nargs=2, metavar=("ROW", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.peak:
        print(json.dumps(peak(*args.peak)))
        return
    began, records = time.time(), []
    for name in args.rows:
        records.append(peaks(name, args.sides) if args.memory else measure(name, args.rounds, args.sides))
        print(format_table([records[-1]]) if args.memory else table(records[-1:]), flush=True)
    if args.memory:
        print(format_table(records))
    else:
        print(table(records))
    print(f"one thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.time() - began:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))
    if args.picture and not args.memory:
        picture(records, args.picture)


if __name__ == "__main__":
    main()
