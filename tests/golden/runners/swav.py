import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl import distributed
from hf_ssl.heads import Prototypes
from hf_ssl.methods.joint_embedding.swav import SwAVConfig, SwAVForPreTraining
from hf_ssl.multi_view import MultiViewModel
from tests.contract.tiny import VIT
from tests.golden.harness import Case, runner
from tests.golden.ranks import on_ranks

RUN = 1_000_000  # optimiser steps that the official counts of iterations are made a share of


def projector(case: Case) -> nn.Linear:
    """The toy network of the case, in place of backbone and projector."""
    layer = nn.Linear(case.config["din"], case.config["dim"])
    layer.load_state_dict({name: case.tensors[f"weight.proj.{name}"] for name in ("weight", "bias")})
    return layer


def set_prototypes(model: MultiViewModel, weights: list[Tensor]) -> None:
    heads = [Prototypes(weight.shape[1], weight.shape[0]) for weight in weights]
    for head, weight in zip(heads, weights, strict=True):
        head.load_state_dict({"weight": weight})
        head.normalise()  # the official code does at the start of every step, ours after every one
    model.prototypes = nn.ModuleList(heads)


def crop_order(config: dict) -> list[int]:
    """The crops that are assigned come first in ours."""
    assigned = list(config["crops_for_assign"])
    return assigned + [crop for crop in range(sum(config["nmb_crops"])) if crop not in assigned]


def sgd(parameters: dict[str, nn.Parameter], rate: float) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad)


@runner("swav/sinkhorn")
def sinkhorn(case: Case) -> dict[str, Tensor]:
    scores = case.input("scores")
    return {
        f"q_iters{count}": distributed.sinkhorn(scores, case.config["epsilon"], count)
        for count in case.config["iters_list"]
    }


@runner("swav/sinkhorn_2rank")
def sinkhorn_of_ranks(case: Case) -> dict[str, Tensor]:
    """The rows of all ranks share the prototypes; scores come rank by rank, or whole and are dealt out here."""
    c, world = case.config, max(case.world, case.config.get("world", 2))

    def assign(rank: int) -> dict[str, Tensor]:
        whole = "input.scores" in case.tensors
        scores = case.input("scores").chunk(world)[rank] if whole else case.input(f"rank{rank}.scores")
        return {f"q_iters{count}": distributed.sinkhorn(scores, c["epsilon"], count) for count in c["iters_list"]}

    parts = on_ranks(world, assign)
    got = {f"rank{rank}.{name}": value for rank, part in enumerate(parts) for name, value in part.items()}
    return got | {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@runner("swav/train")
@runner("swav/train_queue")
def train(case: Case) -> dict[str, Tensor]:
    config = case.config
    start = config.get("epoch", 0) * config["iters"]
    model = SwAVForPreTraining(
        SwAVConfig(
            backbone_config=dict(VIT),
            projection_dim=config["dim"],
            num_prototypes=config["K"],
            temperature=config["temperature"],
            epsilon=config["epsilon"],
            sinkhorn_iterations=config["sinkhorn_iterations"],
            queue_size=config.get("queue") or 0,
            queue_start=0.0,
            freeze_prototypes=config["freeze_prototypes_niters"] / RUN,
            assigned_crops=len(config["crops_for_assign"]),
        )
    ).train()
    model.projector = projector(case)
    set_prototypes(model, [case.tensors["weight.prototypes.weight"]])
    trained = {f"proj.{name}": p for name, p in model.projector.named_parameters()}
    trained["prototypes.weight"] = model.prototypes[0].weight
    got: dict[str, Tensor] = {}
    for step, rate in zip(range(config["iters"]), config["lrs"], strict=True):
        crops = torch.stack([case.input(f"step{step}.crop{crop}") for crop in crop_order(config)])
        rows = F.normalize(model.projector(crops), dim=2)
        got |= assignments(model, rows, step)
        loss, _ = model.learn(rows)
        for parameter in trained.values():
            parameter.grad = None
        loss.backward()
        model.before_optimizer_step((start + step) / RUN)
        got[f"step{step}.loss"] = loss.detach()
        got |= {f"grad.step{step}.{k}": p.grad.clone() for k, p in trained.items() if p.grad is not None}
        sgd(trained, rate)
        got |= {f"final.{name}": p.detach().clone() for name, p in trained.items()}
        model.after_optimizer_step((start + step) / RUN)
    return got | ({} if model.queue is None else {"queue_final": newest_first(model, config["bs"])})


def assignments(model: SwAVForPreTraining, rows: Tensor, step: int) -> dict[str, Tensor]:
    seen: list[int] = []
    plain = distributed.sinkhorn

    def counted(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
        seen.append(int(scores.isfinite().any(1).sum()))
        return plain(scores, epsilon, iterations)

    distributed.sinkhorn = counted
    try:
        targets = model.assign(model.prototypes[0](rows.detach()[: model.config.assigned_crops]))
    finally:
        distributed.sinkhorn = plain
    got = {f"step{step}.q_assign{i}": target for i, target in enumerate(targets)}
    return got | {f"step{step}.rows_in_sinkhorn{i}": torch.tensor(count) for i, count in enumerate(seen)}


def newest_first(model: SwAVForPreTraining, batch: int) -> Tensor:
    """The official queue: by crop, the newest batch first, zeros where nothing came yet."""
    queue = model.queue
    assert queue is not None
    size = len(queue.rows)
    rows = queue.rows[(int(queue.pointer) + torch.arange(size)) % size]  # from the oldest
    rows = rows * (torch.arange(size) >= size - int(queue.filled))[:, None]
    rows = torch.cat(rows.split(batch)[::-1])
    return rows.unflatten(1, (model.config.assigned_crops, -1)).transpose(0, 1)
