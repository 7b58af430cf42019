from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.losses import variance_and_covariance, vicreg_sum
from hf_ssl.methods.joint_embedding.vicregl import VICRegLConfig, VICRegLForPreTraining, View, by_feature, by_place
from tests.golden.harness import Case, gradients, runner
from tests.golden.ranks import on_ranks
from tests.golden.runners.dino import small_vit

TERMS = ("inv", "var", "cov")


def views_of(case: Case, prefix: str) -> list[dict[str, Tensor]]:
    """The leaves of each view, and where its places lie in the picture."""
    views = []
    for view in range(len(case.config["grids"])):
        leaves = {name: case.input(f"{prefix}{name}{view}").requires_grad_() for name in ("embedding", "maps")}
        views.append(leaves | {"places": case.input(f"{prefix}locations{view}").flatten(1, 2)})
    return views


def as_view(leaves: dict[str, Tensor], matches: int, args: dict[str, Any]) -> View:
    kept = min(matches, leaves["maps"].shape[1])
    by_feature = None if args["l2_all_matches"] else kept
    return View(leaves["embedding"], leaves["maps"], leaves["places"], kept, by_feature)


def losses(case: Case, prefix: str = "") -> dict[str, Tensor]:
    """The official number of matches belongs to a view's part in a pair, ours to the view: pair by pair it is one."""
    args, leaves = case.config["args"], views_of(case, prefix)
    config = VICRegLConfig(
        backbone_config=small_vit(8), alpha=args["alpha"], projection_dim=4, hidden_dim=4, map_dim=4,
        invariance_weight=args["inv_coeff"], variance_weight=args["var_coeff"], covariance_weight=args["cov_coeff"],
    )  # fmt: skip
    model = VICRegLForPreTraining(config)
    weights = (config.invariance_weight, config.variance_weight, config.covariance_weight)
    pairs = [(i, j) for i in range(2) for j in range(len(leaves)) if i != j]
    first, second = args["num_matches"]
    matched = [(as_view(leaves[i], first, args), as_view(leaves[j], second, args)) for i, j in pairs]
    whole = model._whole_terms([as_view(part, first, args) for part in leaves], pairs)
    if args.get("fast_vc_reg"):
        local = fast_terms(matched, leaves)
    else:
        local = tuple(torch.stack(t).mean() for t in zip(*(model._local_terms([*p], [(0, 1)]) for p in matched)))
    invariance, variance, covariance = local
    local_loss = vicreg_sum(config, invariance, variance, covariance.sum())
    loss = config.alpha * vicreg_sum(config, *whole) + (1 - config.alpha) * local_loss
    got = {f"{prefix}loss": loss}
    for kind, terms in (("global", whole), ("local", local)):
        got |= {f"{prefix}{kind}.{name}": w * t for name, w, t in zip(TERMS, weights, terms, strict=True)}
    for kind, match in (("l2", by_feature), ("location", by_place)):
        got |= dict(zip((f"{kind}.filtered", f"{kind}.neighbour"), match(*matched[0]), strict=True))
    named = {f"{name}{view}": part[name] for view, part in enumerate(leaves) for name in ("embedding", "maps")}
    return got | {f"grad.{prefix}{name}": grad for name, grad in gradients(loss, **named).items()}


@runner("vicregl/local_loss")
def one_process(case: Case) -> dict[str, Tensor]:
    return losses(case)


@runner("vicregl/two_rank")
def two_ranks(case: Case) -> dict[str, Tensor]:
    parts = on_ranks(case.world, lambda rank: losses(case, f"rank{rank}."))
    return {key: value for part in parts for key, value in part.items()}


def fast_terms(matched: list[tuple[View, View]], leaves: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """An official variant that ours leaves out, of our parts: variance and covariance of whole maps.

    Its covariance counts the last view alone and stays a number for each place, the case's loss takes their sum.
    """
    invariance = [
        F.mse_loss(*match(*direction)) / 2
        for pair in matched
        for direction in (pair, pair[::-1])
        for match in (by_feature, by_place)
    ]
    variance = torch.stack([variance_and_covariance(part["maps"])[0] for part in leaves]).mean()
    last = leaves[-1]["maps"]
    covariance = torch.stack([variance_and_covariance(place)[1] for place in last.unbind(1)])
    return torch.stack(invariance).sum() / len(matched), variance, (covariance + covariance.mean()) / len(leaves)
