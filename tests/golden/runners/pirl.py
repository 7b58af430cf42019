from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl.heads import MLPHead, PatchesHead
from hf_ssl.losses import info_nce_logits
from hf_ssl.methods.joint_embedding.infomin import InfoMinConfig, InfoMinForPreTraining
from hf_ssl.methods.joint_embedding.pirl import PIRLConfig, PIRLForPreTraining
from tests.golden.harness import Case, runner
from tests.golden.runners.dino import small_vit


class Encoded(nn.Module):
    """A backbone that hands its input (B, D, 1, 1) on: the cases give encoder outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.zeros(()), requires_grad=False)  # a native model has weights of a type

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=pixel_values)


def heads(case: Case) -> tuple[MLPHead, PatchesHead, dict[str, nn.Module]]:
    """The image's head and the jigsaw's with the case's weights, and all modules by their official prefix."""
    c, weights = case.config, case.part("weight.net")
    hidden = [c["din"]] if c["head"] == "mlp" else []
    patches = weights["head_jig.fc2.weight"].shape[1] // c["dim"]
    image = MLPHead([c["din"], *hidden, c["dim"]], hidden_norm=False, hidden_bias=True)
    jigsaw = PatchesHead(c["din"], hidden[0] if hidden else None, c["dim"], patches)
    first: nn.Module = jigsaw.each if hidden else jigsaw.each[0]
    named = {"head": image, "head_jig.fc1": first, "head_jig.fc2": jigsaw.together}
    for prefix, module in named.items():
        module.load_state_dict(case.part(f"weight.net.{prefix}"))
    return image, jigsaw, named


def sequence(
    case: Case, model: Any, record: Callable[[int, Tensor, Tensor], dict[str, Tensor]], **inputs: Callable[[int], Any]
) -> dict[str, Tensor]:
    """SGD steps of the whole model on given encoder outputs; ``record``: what else a case holds, of unit features."""
    c, got = case.config, {}
    image, jigsaw, named = heads(case)
    model.backbone, model.projector, model.patch_head = Encoded(), image, jigsaw
    model.train()
    sent: dict[str, Tensor] = {}
    for name, head in (("image", image), ("jigsaw", jigsaw)):
        head.register_forward_hook(lambda module, args, output, name=name: sent.update({name: output}))
    parameters = {f"net.{prefix}.{n}": p for prefix, part in named.items() for n, p in part.named_parameters()}
    optimizer = torch.optim.SGD(parameters.values(), lr=c["lr"])
    for step in range(c["steps"]):
        encoded, patches = (
            case.input(f"step{step}.{name}").requires_grad_() for name in ("encoded", "encoded_patches")
        )
        shuffle = case.input(f"step{step}.patch_permutations")
        cut = patches.view(len(encoded), -1, c["din"]).gather(1, shuffle[..., None].expand(-1, -1, c["din"]))
        views = encoded[:, None, :, None, None]
        if model.compared == 2:
            views = torch.cat([views, views.detach()], dim=1)  # the key is given
        given = {name: value(step) for name, value in inputs.items()}
        output = model(views, cut[..., None, None], **given)
        rows, shuffled = (F.normalize(sent[name], dim=1) for name in ("image", "jigsaw"))
        got |= {f"step{step}.{k}": v for k, v in record(step, rows, shuffled).items()}
        optimizer.zero_grad()
        output.loss.backward()
        view_loss = output.metrics["image_loss" if "image_loss" in output.metrics else "view_loss"]
        got |= {f"step{step}.loss": output.loss, f"step{step}.f": rows, f"step{step}.f_jig": shuffled}
        got |= {f"step{step}.loss_image": view_loss, f"step{step}.loss_jigsaw": output.metrics["patch_loss"]}
        got |= {f"grad.step{step}.{name}": p.grad.clone() for name, p in parameters.items()}
        got |= {f"grad.step{step}.encoded": encoded.grad, f"grad.step{step}.encoded_patches": patches.grad}
        optimizer.step()
        model.after_optimizer_step(0.0)
        memory = model.bank if model.compared == 1 else model.queue
        got[f"step{step}.memory"] = memory.rows.clone()
    return got


@runner("pirl/two_steps")
def pirl(case: Case) -> dict[str, Tensor]:
    """PyContrast's: a softmax over the own row and K negatives, drawn for each image."""
    c = case.config
    config = PIRLConfig(
        backbone_config=small_vit(c["din"]), projection_dim=c["dim"], num_examples=c["memory"], temperature=c["tau"],
        bank_momentum=c["m"], patch_weight=c["beta"], nce_negatives=c["K"], criterion="cross_entropy",
    )  # fmt: skip
    model: Any = PIRLForPreTraining(config)
    model.bank.rows.copy_(case.tensors["weight.memory"])
    discriminate = model.discriminate

    def index(step: int) -> Tensor:
        negatives = case.input(f"step{step}.negative_index")[:, 1:]  # the first one is overwritten by the own row
        model.discriminate = partial(discriminate, negatives=negatives)
        return case.input(f"step{step}.index")

    def record(step: int, rows: Tensor, shuffled: Tensor) -> dict[str, Tensor]:
        given = case.input(f"step{step}.index"), case.input(f"step{step}.negative_index")[:, 1:]
        return {"logits": model.logits(rows, *given)[0], "logits_jig": model.logits(shuffled, *given)[0]}

    return sequence(case, model, record, index=index)


@runner("infomin/two_steps")
def infomin(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = InfoMinConfig(
        backbone_config=small_vit(c["din"]), projection_dim=c["dim"], queue_size=c["K"], temperature=c["tau"],
        patch_weight=c["beta"],
    )  # fmt: skip
    model: Any = InfoMinForPreTraining(config)
    model.queue.rows.copy_(case.tensors["weight.memory"])
    model.followed = ()  # the case gives the keys
    keys = iter([case.input(f"step{step}.key") for step in range(c["steps"])])
    model.teach = lambda views: next(keys)

    def record(step: int, rows: Tensor, shuffled: Tensor) -> dict[str, Tensor]:
        key = F.normalize(case.input(f"step{step}.key"), dim=1)
        return {
            name: info_nce_logits(queries, key, model.queue.rows, c["tau"])
            for name, queries in (("logits", rows), ("logits_jig", shuffled))
        }

    return sequence(case, model, record)
