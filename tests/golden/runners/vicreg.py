import torch
from torch import Tensor

from hf_ssl import schedules
from hf_ssl.losses import vicreg_terms
from tests.golden.harness import Case, gradients, runner
from tests.golden.ranks import on_ranks


def weighted(case: Case, terms: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The official loss, and its terms before their coefficients."""
    named = dict(zip(("sim", "std", "cov"), terms, strict=True))
    coefficients = {"sim_coeff": 25.0, "std_coeff": 25.0, "cov_coeff": 1.0, **case.config.get("coeff", {})}
    loss = torch.stack([coefficients[f"{name}_coeff"] * term for name, term in named.items()]).sum()
    return {"loss": loss, **{f"{name}_term": term for name, term in named.items()}}


@runner("vicreg/loss")
def loss(case: Case) -> dict[str, Tensor]:
    first, second = case.input("x").requires_grad_(), case.input("y").requires_grad_()
    got = weighted(case, vicreg_terms(first, second))
    grads = gradients(got["loss"], x=first, y=second)
    return got | {f"grad.{name}": grad for name, grad in grads.items()}


@runner("vicreg/loss_2rank")
def loss_of_ranks(case: Case) -> dict[str, Tensor]:
    """Every rank's loss; the gather's backward sums what all ranks want of a rank's rows, as the official one does."""

    def part(rank: int) -> dict[str, Tensor]:
        sides = {side: case.input(f"rank{rank}.{side}").requires_grad_() for side in "xy"}
        got = weighted(case, vicreg_terms(*sides.values()))
        grads = gradients(got["loss"], **sides)
        got |= {f"grad.{side}": grad for side, grad in grads.items()}
        return {f"rank{rank}.{name}": value for name, value in got.items()}

    return {key: value for part in on_ranks(case.world, part) for key, value in part.items()}


@runner("vicreg/lr_schedule")
def lr_schedule(case: Case) -> dict[str, Tensor]:
    """Ten epochs of warm-up, whatever the length, then a cosine to a thousandth."""
    args, per_epoch = case.config["args"], case.config["len_loader"]
    total, peak = args["epochs"] * per_epoch, args["base_lr"] * args["batch_size"] / 256
    rates = [
        schedules.warmup_cosine(step / total, peak, peak * 1e-3, 10 / args["epochs"]) for step in case.config["steps"]
    ]
    return {"lr": torch.tensor(rates, dtype=torch.float64)}
