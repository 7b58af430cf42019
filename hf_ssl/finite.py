"""Whether a model's numbers are numbers: asked before it is saved or published."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(ArithmeticError):
    """NaN or infinity in a loss, a gradient or weights; the message says where, and what is kept."""


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers of ``model`` that hold NaN or infinity (of a sharded model, the local part).

    One sum over each tensor, then one wait for the device; every element is looked at only where a sum is not finite.
    """
    tensors = {
        name: _local(tensor)
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        if tensor.is_floating_point() and not tensor.is_meta
    }
    if not tensors:
        return []
    device = next(iter(tensors.values())).device
    sums = torch.stack([tensor.sum(dtype=torch.float32).to(device) for tensor in tensors.values()])
    suspects = [name for name, finite in zip(tensors, sums.isfinite().tolist()) if not finite]
    return [name for name in suspects if not bool(tensors[name].isfinite().all())]


def check_finite(model: nn.Module, what: str) -> None:
    """NonFiniteError that names the tensors of ``model`` that hold NaN or infinity; ``what`` is not done then."""
    if names := not_finite(model):
        raise NonFiniteError(f"{what}: {in_words(names)} not finite (NaN or infinity).")


def in_words(names: list[str]) -> str:
    """ "a.weight and 3 more tensors are" """
    more = f" and {len(names) - 1} more tensors are" if len(names) > 1 else " is"
    return f"{names[0]}{more}"


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
