"""What one rank computes: the same code in one process (the reference) and on each of the gloo ranks."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_ssl import distributed
from hf_ssl.methods import METHODS
from hf_ssl.modeling import SSLModel
from tests.contract.tiny import DINOV2, DINOV3, RESNET, TINY, VIT, batch, build

IMAGES = 8
BACKBONES = {"vit": VIT, "resnet": RESNET, "dinov2": DINOV2, "dinov3": DINOV3}


@dataclass(frozen=True)
class Setting:
    method: str
    backbone: str = "vit"
    fields: tuple[tuple[str, Any], ...] = ()
    batchnorm: bool = False  # statistics over the batch: micro-batches see other ones


BATCHNORM_HEADS = {
    "dcl",
    "nnclr",
    "barlow_twins",
    "byol",
    "deepcluster_v2",
    "lejepa",
    "mocov3",
    "msn",
    "obow",
    "pmsn",
    "sela_v2",
    "simclr",
    "simclr_v2",
    "simsiam",
    "swav",
    "tico",
    "vicreg",
    "vicregl",
    "w_mse",
}
SETTINGS: dict[str, Setting] = {name: Setting(name, batchnorm=name in BATCHNORM_HEADS) for name in sorted(METHODS)} | {
    f"{name}-resnet": Setting(name, "resnet", batchnorm=True) for name in sorted(METHODS) if TINY[name].takes_resnet
}
# every row of the bank; the own row against noise; Z estimated, which each first micro-batch would do for itself
SETTINGS["instdisc-softmax"] = Setting("instdisc", fields=(("nce_negatives", 0),))
SETTINGS["instdisc-infonce"] = Setting("instdisc", fields=(("criterion", "cross_entropy"),))
SETTINGS["instdisc-estimate"] = Setting("instdisc", fields=(("partition", None),), batchnorm=True)
SETTINGS["dclw"] = Setting("dcl", fields=(("weighted", True),), batchnorm=True)
SETTINGS["dino-bn-head"] = Setting("dino", fields=(("use_bn_in_head", True),), batchnorm=True)
# two chunks a rank, four in the single process
SETTINGS["clip-chunks"] = Setting("clip", fields=(("micro_batch_size", 2),))
# the rest of the run's conditions: in the middle of the warm-up, the prototypes' gain trained
SETTINGS["dino-warmup"] = Setting("dino", fields=(("norm_last_layer", False), ("teacher_temperature", 0.04)))
# patches are centred over what all ranks mask, few or many; prototypes differ by head
SETTINGS["dinov2-registers"] = Setting(
    "dinov2", "dinov2", (("centering", "sinkhorn"), ("separate_heads", True), ("patch_out_dim", 10))
)
SETTINGS["dinov3-gram"] = Setting("dinov3", "dinov3", (("gram_weight", 2.0), ("gram_warmup", 0.0), ("gram_every", 1)))
# sums and weights of 25 make a first step so long that rounding would show at the second
SETTINGS["barlow_twins"] = Setting("barlow_twins", fields=(("projection_dim", 2),), batchnorm=True)
SETTINGS["barlow_twins-resnet"] = Setting(
    "barlow_twins", "resnet", fields=(("projection_dim", 4), ("num_layers", 1)), batchnorm=True
)
_SHORT = (("invariance_weight", 1.0), ("variance_weight", 1.0), ("covariance_weight", 0.04))
for _name in ("vicreg", "vicregl"):
    SETTINGS[_name] = Setting(_name, fields=_SHORT, batchnorm=True)
    SETTINGS[f"{_name}-resnet"] = Setting(_name, "resnet", fields=_SHORT, batchnorm=True)
# of the conditioned models' guesses about half count
SETTINGS["fixmatch"] = Setting("fixmatch", fields=(("threshold", 0.7),))
SETTINGS["fixmatch-aligned"] = Setting(
    "fixmatch", fields=(("threshold", 0.3), ("temperature", 1.0), ("alignment_momentum", 0.9)), batchnorm=True
)  # soft targets, so that a mean guess of one rank alone shows; a micro-batch is aligned by its own mean guess
SETTINGS["fixmatch-resnet"] = Setting("fixmatch", "resnet", fields=(("threshold", 0.38),), batchnorm=True)


def optimiser_step(name: str, micro_batches: int = 1, steps: int = 2) -> dict[str, Tensor]:
    """Loss, gradients and state of ``steps`` optimiser steps on this rank's share of the same IMAGES pictures.

    Gradients are what the optimiser sees; the loss is the mean over micro-batches and ranks.
    """
    setting = SETTINGS[name]
    model = build(setting.method, BACKBONES[setting.backbone], **dict(setting.fields))
    _condition(model)
    model.total_steps.fill_(10)
    world, rank = distributed.world_size(), distributed.rank()
    wrapped: nn.Module = model
    if world > 1:
        distributed.synchronise_batchnorm(model)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=False)
    add_up = bool(TINY[setting.method].classes)  # whether metrics are means over rows, as in no entropy of a mean
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    result: dict[str, Tensor] = {}
    for step in range(steps):
        views = {key: value.chunk(world)[rank] for key, value in batch(setting.method, IMAGES, seed=step).items()}
        optimizer.zero_grad()
        losses, metrics = [], []
        for index in range(micro_batches):
            part = {key: value.chunk(micro_batches)[index] for key, value in views.items()}
            last = index == micro_batches - 1
            with wrapped.no_sync() if world > 1 and not last else contextlib.nullcontext():
                output = wrapped(**part)
                loss = output.loss / micro_batches
                loss.backward()
            losses.append(loss.detach())
            metrics.append(output.metrics or {})
        result[f"loss{step}"] = distributed.all_mean(torch.stack(losses).sum())
        for key in metrics[0] if add_up else ():
            result[f"metric{step}.{key}"] = distributed.all_mean(torch.stack([part[key] for part in metrics]).mean(0))
        result |= {f"grad{step}.{k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        model.before_optimizer_step(step / 10)
        optimizer.step()
        model.after_optimizer_step(step / 10)
    return result | {f"state.{key}": value.detach().clone() for key, value in model.state_dict().items()}


@torch.no_grad()
def _condition(model: SSLModel) -> None:
    """Weights that keep the signal's size, so that float32 rounding stays far below the gate's 1e-5."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    for student, teacher in model.teachers():
        teacher.load_state_dict(student.state_dict())


def gather() -> dict[str, Tensor]:
    """A loss over gathered rows whose gradient needs the other rank's part; means that must be used and are not."""
    rank = distributed.rank()
    x = torch.arange(4.0).reshape(2, 2).add(10 * rank).requires_grad_()
    everything = distributed.gather_with_grad(x)
    loss = (everything * everything.detach().flip(0) * (1 + rank)).sum()
    loss.backward()
    return {
        "gathered": everything.detach(),
        "grad": x.grad,
        "mean": distributed.all_mean(torch.tensor([1.0 + rank, 5.0])),
        "weighted": distributed.all_mean(torch.tensor(1.0 + rank), 1 + 2 * rank),
        "nothing": distributed.all_mean(torch.tensor(1.0), 0.0),
    }


def batchnorm() -> dict[str, Tensor]:
    """Three training passes and one evaluation of a normed convolution, cumulative average included."""
    result: dict[str, Tensor] = {}
    for momentum in (0.1, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=momentum), nn.Conv2d(3, 1, 1))
        images = 5 * torch.randn(3, 8, 2, 2, 2) + torch.arange(8.0).view(1, 8, 1, 1, 1)  # the halves differ in mean
        distributed.synchronise_batchnorm(model)
        for step, x in enumerate(images):
            output = model(x.chunk(distributed.world_size())[distributed.rank()])
            loss = output.pow(3).mean()
            model.zero_grad()
            loss.backward()
            for key, p in model.named_parameters():
                if distributed.world_size() > 1:
                    dist.all_reduce(p.grad)
                    p.grad /= distributed.world_size()
                result[f"{momentum}.{step}.{key}"] = p.grad.clone()
        result |= {f"{momentum}.{key}": buffer.clone() for key, buffer in model.named_buffers()}
        result[f"{momentum}.eval"] = model.eval()(images[0, :2]).detach()
    return result


def sinkhorn() -> dict[str, Tensor]:
    """Assignments of nine rows, five of them rank 0's; a row of −∞ among them; a rank that has none."""
    torch.manual_seed(0)
    scores = torch.randn(9, 6)
    masked = scores.clone()
    masked[[1, 7]] = float("-inf")
    splits = {"whole": (scores, 5, 3), "unscaled": (scores, 5, 0), "masked": (masked, 5, 3), "empty": (scores, 9, 3)}
    result = {}
    for name, (rows, mine, iterations) in splits.items():
        share = rows.tensor_split([mine])[distributed.rank()] if distributed.world_size() > 1 else rows
        result[name] = distributed.sinkhorn(share, 0.5, iterations)
    return result


def first() -> dict[str, Tensor]:
    """What the first rank alone computes, alone: its number of ranks and its own rank; then an error of its."""
    told = distributed.from_first(lambda: [distributed.world_size(), dist.get_rank()])
    try:
        distributed.from_first(lambda: int("seven"))
    except ValueError as error:
        told.append(len(str(error)))
    return {"told": torch.tensor(told), "again": distributed.all_mean(torch.ones(1))}


def arrival() -> dict[str, Tensor]:
    """Both ranks arrive at one place, and at another only the first, whose next collective is as it was."""
    both = distributed.all_arrive("both", 60.0)
    one = distributed.rank() == 0 and distributed.all_arrive("one", 0.1)
    mean = distributed.all_mean(torch.tensor(float(distributed.rank())))
    return {"both": torch.tensor(both), "one": torch.tensor(one), "mean": mean}


def scenario(name: str) -> dict[str, Tensor]:
    if name in ("gather", "batchnorm", "sinkhorn", "arrival", "first"):
        return globals()[name]()
    setting, _, micro = name.partition("/")
    return optimiser_step(setting, int(micro or 1))
