from unittest import mock

import torch
from torch import Tensor, nn

from hf_ssl.heads import MLPHead
from hf_ssl.methods.joint_embedding import w_mse
from tests.golden.harness import Case, runner
from tests.golden.runners.dino import small_vit
from tests.golden.runners.moco import Body, as_views


@runner(
    "wmse/whitening",
    without={
        "running_": "W-MSE's loss never looks at running statistics, and ours keeps none",
        "y_eval": "whitening with running statistics: nothing is whitened outside training here",
    },
)
def whitening(case: Case) -> dict[str, Tensor]:
    rows = case.input("x").requires_grad_()
    white = w_mse.whiten(rows, case.config["eps"])
    (white * case.input("upstream")).sum().backward()
    return {"y": white, "grad.x": rows.grad}


def model_of(case: Case) -> w_mse.WMSEForPreTraining:
    c = case.config["w"]
    config = w_mse.WMSEConfig(
        backbone_config=small_vit(c["hid"]), projection_dim=c["emb"], hidden_dim=c["head_size"],
        num_layers=c["head_layers"], sub_batch=c["w_size"], iterations=c["w_iter"], epsilon=c["w_eps"],
        normalise=c["norm"],
    )  # fmt: skip
    model = w_mse.WMSEForPreTraining(config)
    model.backbone = Body(c["din"], c["hid"])
    if not c["add_bn"]:
        widths = [c["hid"], *[c["head_size"]] * (c["head_layers"] - 1), c["emb"]]
        model.projector = MLPHead(widths, hidden_norm=False, hidden_bias=True)
    model.backbone.body.load_state_dict(case.part("weight.model.0"))
    model.projector.load_state_dict(case.part("weight.head"))
    return model.train()


@runner("wmse/two_steps")
def two_steps(case: Case) -> dict[str, Tensor]:
    """Ours orders the images by numbers that the step decides: here by those that give the recorded permutations."""
    c, model, got = case.config["w"], model_of(case), {}
    parts: dict[str, nn.Module] = {"model.0": model.backbone.body, "head": model.projector}
    named = {f"{prefix}.{name}": p for prefix, part in parts.items() for name, p in part.named_parameters()}
    optimizer = torch.optim.SGD(named.values(), lr=case.config["lr"])
    steps = sum(key.startswith("input.step") and key.endswith(".view0") for key in case.tensors)
    for step in range(steps):
        orders = torch.stack([case.input(f"step{step}.perm{index}") for index in range(c["w_iter"])])
        views = as_views(case, *(f"step{step}.view{view}" for view in range(c["num_samples"])))
        with mock.patch.object(w_mse, "step_uniform", return_value=orders.argsort(-1)):
            loss = model(views).loss
        optimizer.zero_grad()
        loss.backward()
        got[f"step{step}.loss"] = loss
        got |= {f"grad.step{step}.{name}": p.grad.clone() for name, p in named.items()}
        optimizer.step()
    return got | {f"after.{name}": p for name, p in named.items()}
