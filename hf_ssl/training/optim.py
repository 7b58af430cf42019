"""Optimisers of our own, parameter groups, learning-rate scaling, clipping per tensor and per module."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .lars import LARS

_NEVER_DECAYED = ("token", "position", "pos_embed", "logit_scale", "logit_bias", "layer_scale", "lambda1", "gamma")


def decay_names(model: nn.Module, tokens: bool = False) -> set[str]:
    """Names of the trainable parameters that weight decay applies to: weight matrices and kernels, nothing else.

    Not decayed: 1-D parameters (biases, norms) and, unless ``tokens``, class/mask tokens, position codes, scales and
    weight-norm gains. ``tokens=True`` is official DINO's rule, which decays everything with more than one dimension.
    """
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim > 1
        and not name.endswith(".bias")
        and (tokens or not (name.endswith("weight_g") or any(word in name for word in _NEVER_DECAYED)))
    }


def scaled_learning_rate(base: float, rule: tuple[str, int], global_batch: int) -> float:
    """The method's published scaling: ("linear", 256) is base · batch/256, "sqrt" base · √(batch/n), "none" base."""
    kind, reference = rule
    if kind == "none":
        return base
    ratio = global_batch / reference
    return base * (ratio if kind == "linear" else ratio**0.5)


def own_optimiser(name: str, learning_rate: float, momentum: float) -> tuple[type[torch.optim.Optimizer], dict]:
    """Class and arguments of what ``optim`` may name beside transformers' own (``arguments.OPTIMISERS``)."""
    shared = {"lr": learning_rate, "momentum": momentum}
    if name == "lars":
        return LARS, shared
    return torch.optim.SGD, {**shared, "nesterov": name == "sgd_nesterov" and momentum > 0}


def mark_groups(
    optimizer: torch.optim.Optimizer,
    decayed: Iterable[Tensor],
    constant: Iterable[Tensor],
    rates: Iterable[tuple[Tensor, float]] = (),
) -> None:
    """Every parameter group says whether it is ``decayed`` and of ``constant_rate``; a group of both rates is split.

    rates: (parameter, its share of the learning rate); groups are split by it too, and the schedule scales each.
    """
    with_decay, held = ({id(parameter) for parameter in parameters} for parameters in (decayed, constant))
    for group in list(optimizer.param_groups):
        group["decayed"] = all(id(parameter) in with_decay for parameter in group["params"])
        if isinstance(optimizer, LARS):
            group["always_adapt"] = group["decayed"]
        apart = [parameter for parameter in group["params"] if id(parameter) in held]
        group["constant_rate"] = 0 < len(apart) == len(group["params"])
        if 0 < len(apart) < len(group["params"]):
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in held]
            optimizer.add_param_group({**group, "params": apart, "constant_rate": True})
    _split_by_rate(optimizer, {id(parameter): share for parameter, share in rates})


def _split_by_rate(optimizer: torch.optim.Optimizer, shares: dict[int, float]) -> None:
    """One group per share of the learning rate, in order of the shares, the first in the old group's place."""
    for group in list(optimizer.param_groups):
        found: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            found.setdefault(shares.get(id(parameter), 1.0), []).append(parameter)
        full = group["lr"]
        for index, (share, parameters) in enumerate(sorted(found.items())):
            if index == 0:
                group.update(params=parameters, lr=full * share)
            else:
                optimizer.add_param_group({**group, "params": parameters, "lr": full * share})


def hold_constant_rates(scheduler: Any) -> None:
    """Groups of ``constant_rate`` keep their learning rate at every step, warm-up included; the others' is untouched.

    The factors are functions, which no checkpoint holds: a resumed run gets them here again. ValueError where the
    schedule is not one of factors.
    """
    groups = scheduler.optimizer.param_groups
    held = [index for index, group in enumerate(groups) if group.get("constant_rate")]
    if not held:
        return
    if not hasattr(scheduler, "lr_lambdas"):
        raise ValueError(
            f"{type(scheduler).__name__} cannot leave out the parameters whose learning rate this method keeps "
            "constant: choose another lr_scheduler_type, such as cosine_with_min_lr"
        )
    for index in held:
        scheduler.lr_lambdas[index] = lambda step: 1.0
        groups[index]["lr"] = groups[index]["initial_lr"]
    scheduler._last_lr = [group["lr"] for group in groups]


def take_settings(optimizer: Any, scheduler: Any, fresh: list[dict[str, Any]]) -> None:
    """After a checkpoint's state was loaded: the settings of this run's groups, the schedule where it stands.

    fresh: the settings of each group as they were before. A state that is loaded brings its own learning rate.
    """
    held = [group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0 for group in optimizer.param_groups]
    for group, new in zip(optimizer.param_groups, fresh):
        group.update(new)
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if hasattr(scheduler, "lr_lambdas"):
        held = [shape(scheduler.last_epoch) for shape in scheduler.lr_lambdas]
    for group, rate, factor in zip(optimizer.param_groups, rates, held):
        group["lr"] = rate * factor
    scheduler.base_lrs, scheduler._last_lr = rates, [group["lr"] for group in optimizer.param_groups]


@torch.no_grad()
def clip_per_tensor(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale each parameter's gradient to a norm of at most ``max_norm``, on its own (DINO); returns the norms before.

    Never reads a norm back to the host: the factor min(1, max_norm / (norm + 1e-6)) is applied on the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(0)
    norms = torch._foreach_norm(gradients)
    factors = [(max_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
    torch._foreach_mul_(gradients, factors)
    return torch.stack([getattr(norm, "full_tensor", lambda n=norm: n)() for norm in norms])


def clip_per_module(model: nn.Module, max_norm: float) -> None:
    """Scale the gradients of each direct child of ``model`` (backbone, each head) to a norm of at most ``max_norm``
    (DINOv2). Like ``clip_per_tensor`` it never reads a norm back to the host."""
    for child in model.children():
        if trained := [parameter for parameter in child.parameters() if parameter.grad is not None]:
            nn.utils.clip_grad_norm_(trained, max_norm)
