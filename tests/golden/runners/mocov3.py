import torch
from torch import Tensor

from hf_ssl import backbones, distributed
from hf_ssl.methods.joint_embedding.mocov3 import MoCoV3Config, MoCoV3ForPreTraining, contrast
from hf_ssl.momentum import ema_update
from tests.golden.harness import Case, gradients, runner
from tests.golden.ranks import on_ranks
from tests.golden.runners.dino import small_vit
from tests.golden.runners.moco import Body, as_views

_RESNET = {"model_type": "resnet", "embedding_size": 8, "depths": [1], "layer_type": "basic"}
_PARTS = {"base_encoder": "", "momentum_encoder": "teacher_"}


def our_name(official: str) -> str:
    """``base_encoder.{body,head,fc}``, ``momentum_encoder`` alike, ``predictor`` -> our state dict."""
    part, rest = official.split(".", 1)
    if part == "predictor":
        return official
    inner, rest = rest.split(".", 1)
    return _PARTS[part] + (f"backbone.body.{rest}" if inner == "body" else f"projector.{rest}")


@runner("mocov3/vit")
@runner("mocov3/resnet")
def model(case: Case) -> dict[str, Tensor]:
    """As in MoCo's runner: the official EMA comes before the keys, with the momentum of the step."""
    c, official = case.config, case.config["moco"]
    backbone = small_vit(c["hidden"]) if c["kind"] == "vit" else {**_RESNET, "hidden_sizes": [c["hidden"]]}
    config = MoCoV3Config(
        backbone_config=backbone, projection_dim=official["dim"], hidden_dim=official["mlp_dim"],
        temperature=official["T"], fixed_positions=False,
    )  # fmt: skip
    ours = MoCoV3ForPreTraining(config)
    ours.backbone, ours.teacher_backbone = Body(c["din"], c["hidden"]), Body(c["din"], c["hidden"])
    weights = {our_name(key): value for key, value in case.part("weight").items()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"step", "total_steps"}, (missing, unexpected)
    ours.train()
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=c["lr"])
    got: dict[str, Tensor] = {}
    for step, momentum in zip(range(c["steps"]), c["m"], strict=True):
        for student, teacher in ours.teachers():
            ema_update(student, teacher, momentum)
        loss = ours(as_views(case, f"step{step}.x1", f"step{step}.x2")).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        got[f"step{step}.loss"] = loss
        parameters, state = dict(ours.named_parameters()), ours.state_dict()
        for key in case.part("weight"):
            name = our_name(key)
            got[f"step{step}.after.{key}"] = state[name].clone()
            if name in parameters and parameters[name].grad is not None:
                got[f"grad.step{step}.{key}"] = parameters[name].grad.clone()
    return got


@runner("mocov3/sincos2d")
def sincos2d(case: Case) -> dict[str, Tensor]:
    """The official table of a grid (height, width) runs down the columns first: ours of the grid turned over."""
    height, width = case.config["grid"]
    return {"pos_embed": backbones.sincos_2d(case.config["dim"], (width, height), prefix=1, row_first=True)[None]}


@runner("mocov3/contrastive_1rank")
@runner("mocov3/contrastive_2rank")
def ranks(case: Case) -> dict[str, Tensor]:
    """Each rank's loss against the keys of all; one rank alone may have no number."""

    def part(rank: int) -> dict[str, Tensor]:
        prefix = "" if "input.q" in case.tensors else f"rank{rank}."
        queries, keys = case.input(f"{prefix}q").requires_grad_(), case.input(f"{prefix}k")
        own = distributed.rank() * len(queries)
        loss, _ = contrast(queries, distributed.gather_with_grad(keys), case.config["T"], own)
        return {f"{prefix}loss": loss, f"grad.{prefix}q": gradients(loss, q=queries)["q"]}

    return {key: value for part in on_ranks(case.world, part) for key, value in part.items()}
