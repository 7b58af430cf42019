"""LARS with the published trust ratio, on timm's implementation."""

import torch
from timm.optim.lars import Lars


class LARS(Lars):
    """timm's LARS, but with the trust ratio η‖w‖ / ‖g + wd·w‖ of the official code (You et al. 2017, 1708.03888).

    timm divides by ‖g‖ + wd‖w‖, as apex does. Folding the decay into the gradient first makes timm's own step compute
    the official ratio. A parameter group with ``always_adapt=False`` and no decay (1-D parameters) is plain SGD.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust_coeff: float = 1e-3):
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coeff=trust_coeff, eps=0.0,
            always_adapt=True,
        )  # fmt: skip

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            if decay and params:
                torch._foreach_add_([p.grad for p in params], params, alpha=decay)
            group["weight_decay"] = 0.0
        try:
            super().step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        return loss
