import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.methods.joint_embedding.deepcluster_v2 import DeepClusterV2Config, DeepClusterV2ForPreTraining
from tests.contract.tiny import VIT
from tests.golden.harness import Case, runner
from tests.golden.runners.swav import RUN, crop_order, projector, set_prototypes, sgd


@runner("deepcluster_v2/epoch")
def epoch(case: Case) -> dict[str, Tensor]:
    """The given bank is clustered, then one epoch is learnt, which fills the bank anew."""
    config = case.config
    heads, views = len(config["Ks"]), len(config["crops_for_assign"])
    model = DeepClusterV2ForPreTraining(
        DeepClusterV2Config(
            backbone_config=dict(VIT),
            projection_dim=config["dim"],
            num_prototypes=max(config["Ks"]),
            heads=heads,
            temperature=config["temperature"],
            num_examples=config["N"],
            assigned_crops=views,
            freeze_prototypes=config["freeze_prototypes_niters"] / RUN,
        )
    ).train()
    model.projector = projector(case)
    set_prototypes(model, [case.tensors[f"weight.prototypes.prototypes{head}.weight"] for head in range(heads)])
    held = case.input("memory_index")
    cluster(model, held, case)
    got = {"assignments": model.memory.labels.clone()}
    got |= {f"centroids.prototypes{head}.weight": p.weight.detach().clone() for head, p in enumerate(model.prototypes)}
    trained = {f"proj.{name}": p for name, p in model.projector.named_parameters()}
    trained |= {f"prototypes.prototypes{head}.weight": p.weight for head, p in enumerate(model.prototypes)}
    order, crops = case.input("dataset_order"), crop_order(config)
    batches = [rows for rows in order.split(config["bs"]) if len(rows) == config["bs"]]
    seen = held.clone()
    for step, (index, rate) in enumerate(zip(batches, config["lrs"], strict=False)):
        rows = F.normalize(model.projector(torch.stack([case.input(f"crop{crop}")[index] for crop in crops])), dim=2)
        loss, _ = model.learn(rows, index)
        for parameter in trained.values():
            parameter.grad = None
        loss.backward()
        model.before_optimizer_step(step / RUN)
        got[f"step{step}.loss"] = loss.detach()
        got |= {f"grad.step{step}.{k}": p.grad.clone() for k, p in trained.items() if p.grad is not None}
        sgd(trained, rate)
        model.memory.bank.advance()  # not the end of the epoch, at which a new clustering would begin
        seen[step * config["bs"] : (step + 1) * config["bs"]] = index
    rows = torch.stack([model.memory.view(view)[seen] for view in range(views)])
    return got | {"memory_index_after": seen, "memory_embeddings_after": rows}


def cluster(model: DeepClusterV2ForPreTraining, held: Tensor, case: Case) -> None:
    """Put the case's rows in the bank, draw the case's images to start from, and let the model end its epoch."""
    embeddings = case.input("memory_embeddings")
    for index, rows in zip(held.split(1), embeddings.split(1, dim=1), strict=True):
        model.memory.push(index, rows)
    model.start_rows = (
        lambda head: model.memory.view(head)[  # type: ignore[method-assign]
            held[case.input(f"kmeans_init_perm{head}")[: len(model.prototypes[head].weight)]]
        ]
    )
    model.update_state()
    assert int(model.memory.clock[1]) == 1
