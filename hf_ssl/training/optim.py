"""Parameter groups, learning-rate scaling and per-tensor clipping."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

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
