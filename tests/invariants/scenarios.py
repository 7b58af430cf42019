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
from tests.contract.tiny import RESNET, TINY, VIT, batch, build

IMAGES = 8


@dataclass(frozen=True)
class Setting:
    method: str
    backbone: str = "vit"
    fields: tuple[tuple[str, Any], ...] = ()
    batchnorm: bool = False  # statistics over the batch: micro-batches see other ones


SETTINGS: dict[str, Setting] = {name: Setting(name, batchnorm=name == "simclr") for name in sorted(METHODS)} | {
    f"{name}-resnet": Setting(name, "resnet", batchnorm=True) for name in sorted(METHODS) if TINY[name].takes_resnet
}
SETTINGS["dino-bn-head"] = Setting("dino", fields=(("use_bn_in_head", True),), batchnorm=True)
# two chunks a rank, four in the single process
SETTINGS["clip-chunks"] = Setting("clip", fields=(("micro_batch_size", 2),))
# the rest of the run's conditions: in the middle of the warm-up, the prototypes' gain trained
SETTINGS["dino-warmup"] = Setting("dino", fields=(("norm_last_layer", False), ("teacher_temperature", 0.04)))
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
    model = build(setting.method, VIT if setting.backbone == "vit" else RESNET, **dict(setting.fields))
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


def scenario(name: str) -> dict[str, Tensor]:
    if name in ("gather", "batchnorm"):
        return globals()[name]()
    setting, _, micro = name.partition("/")
    return optimiser_step(setting, int(micro or 1))
