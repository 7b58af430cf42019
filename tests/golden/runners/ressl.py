import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.losses import similarities
from hf_ssl.methods.joint_embedding.ressl import ReSSLConfig, ReSSLForPreTraining
from hf_ssl.momentum import ema_update
from tests.golden.harness import Case, runner
from tests.golden.ranks import on_ranks
from tests.golden.runners.dino import small_vit
from tests.golden.runners.moco import Body

_PARTS = {"fc": "backbone.body", "out": "projector.0"}
_SIDES = {"encoder_q": "", "encoder_k": "teacher_"}


def our_name(official: str) -> str:
    """``encoder_q.fc.weight`` -> our state dict."""
    side, part, leaf = official.split(".")
    return f"{_SIDES[side]}{_PARTS[part]}.{leaf}"


def model_of(case: Case) -> ReSSLForPreTraining:
    c, weights = case.config, case.part("weight")
    hidden, width = weights["encoder_q.fc.weight"].shape
    config = ReSSLConfig(
        backbone_config=small_vit(hidden), projection_dim=c["dim"], num_layers=1, queue_size=c["K"],
        teacher_momentum=c["m"], teacher_temperature=c["t"], temperature=0.1,
    )  # fmt: skip
    model = ReSSLForPreTraining(config)
    model.backbone, model.teacher_backbone = Body(width, hidden), Body(width, hidden)
    queue, pointer = weights.pop("queue"), weights.pop("queue_ptr")
    _, unexpected = model.load_state_dict({our_name(key): value for key, value in weights.items()}, strict=False)
    assert not unexpected, unexpected
    model.queue.rows.copy_(queue.T)
    model.queue.pointer.copy_(pointer[0])
    return model.train()


def sequence(case: Case, prefix: str) -> dict[str, Tensor]:
    """The official teacher moves before its keys, ours after the optimiser step: one EMA comes beforehand.

    Several strong crops of an image each meet the weak view's relations, crop after crop.
    """
    c, model, got = case.config, model_of(case), {}
    for student, teacher in model.teachers():
        ema_update(student, teacher, c["m"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=c["lr"])
    crops = [f"strong{crop}" for crop in range(c["crops"])] if "crops" in c else ["strong"]
    for step in range(c["steps"]):
        strong, weak = (
            torch.stack([case.input(f"{prefix}step{step}.{name}") for name in names], dim=1)[..., None, None]
            for names in (crops, ["weak"])
        )
        if len(crops) == 1:
            loss = model(torch.cat([strong, weak], dim=1)).loss  # pushes the keys as well
        queries = F.normalize(model.projector(model.encode(strong)), dim=1)
        keys = F.normalize(model.teach(weak), dim=1) if len(crops) == 1 else model.keys(weak)
        keys = keys.repeat(len(crops), 1)
        if len(crops) > 1:
            loss, _ = model.relate(queries, keys)
        rows = model.queue.rows
        got[f"step{step}.loss"] = loss
        got[f"step{step}.logits_q"] = similarities(queries, rows)
        got[f"step{step}.logits_k"] = similarities(keys, rows)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            official = next((key for key in case.part("weight") if "." in key and our_name(key) == name), None)
            if official is not None and parameter.grad is not None:
                got[f"grad.{prefix}step{step}.{official}"] = parameter.grad.clone()
        optimizer.step()
        if step == c["steps"] - 1:  # the official teacher has not yet seen this last step
            state = model.state_dict()
            got |= {f"after.{k}": state[our_name(k)].clone() for k in case.part("weight") if k.startswith("encoder_k")}
        model.after_optimizer_step(0.0)
    got |= {"after.queue": model.queue.rows.T, "after.queue_ptr": model.queue.pointer[None]}
    return {key if key.startswith("grad.") else prefix + key: value for key, value in got.items()}


@runner("ressl/two_steps")
@runner("ressl/multicrop")
def one_process(case: Case) -> dict[str, Tensor]:
    return sequence(case, "")


@runner("ressl/two_rank")
def two_ranks(case: Case) -> dict[str, Tensor]:
    parts = on_ranks(case.world, lambda rank: sequence(case, f"rank{rank}."))
    return {key: value for part in parts for key, value in part.items()}
