import torch
from torch import Tensor, nn

from hf_ssl.methods.joint_embedding.simsiam import SimSiamConfig, SimSiamForPreTraining
from tests.golden.harness import Case, runner
from tests.golden.runners.dino import small_vit

FROZEN = "encoder.fc.6.bias"  # official, never trained: a BatchNorm takes it out again, so ours has none


@runner("simsiam/model")
def model(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = SimSiamConfig(
        backbone_config=small_vit(c["hidden"]), projection_dim=c["dim"], bottleneck_dim=c["pred_dim"]
    )
    ours = SimSiamForPreTraining(config).train()
    weights = case.part("weight")
    body = nn.Linear(c["din"], c["hidden"])  # the case's toy backbone
    parts = {"encoder.body": body, "encoder.fc": ours.projector, "predictor": ours.predictor}
    for prefix, part in parts.items():
        state = {key.removeprefix(prefix + "."): value for key, value in weights.items() if key.startswith(prefix)}
        state.pop("6.bias", None)
        part.load_state_dict(state)
    seen: dict[str, list[Tensor]] = {"z": [], "p": []}
    for name, part in (("z", ours.projector), ("p", ours.predictor)):
        part.register_forward_hook(lambda module, args, output, name=name: seen[name].append(output))
    views = [case.input("x1"), case.input("x2")]
    loss, _ = ours.objective(body(torch.cat(views)).relu(), views[0])
    loss.backward()
    got = {"loss": loss, **{f"{name}{view + 1}": rows[view] for name, rows in seen.items() for view in (0, 1)}}
    for prefix, part in parts.items():
        got |= {f"grad.{prefix}.{name}": parameter.grad for name, parameter in part.named_parameters()}
        got |= {f"after.{prefix}.{name}": buffer for name, buffer in part.named_buffers()}
    last = ours.projector[-1]
    seen_twice = 1 - (1 - last.momentum) ** 2
    got["after.encoder.fc.7.running_mean"] = last.running_mean + seen_twice * weights[FROZEN]
    return got
