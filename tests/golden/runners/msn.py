import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.methods.joint_embedding.msn import MSNConfig, MSNForPreTraining
from tests.contract.tiny import VIT
from tests.golden.harness import Case, gradients, runner
from tests.golden.ranks import on_ranks

SINKHORN = 3  # iterations, a constant in the official code


def model_of(case: Case, prototypes: Tensor, iterations: int, smoothing: float = 0.0) -> MSNForPreTraining:
    settings = case.config
    model = MSNForPreTraining(
        MSNConfig(
            backbone_config=dict(VIT),
            out_dim=len(prototypes),
            projection_dim=prototypes.shape[1],
            hidden_dim=8,
            temperature=settings.get("tau", 0.1),
            sharpening=settings.get("T", 0.25),
            sinkhorn_iterations=iterations,
            label_smoothing=smoothing,
            prior_weight=settings.get("memax_weight", 1.0),
            entropy_weight=settings.get("ent_weight", 0.0),
        )
    )
    with torch.no_grad():
        model.prototypes.copy_(prototypes)
    return model


def assigned(model: MSNForPreTraining, targets: Tensor, views: int) -> Tensor:
    """The official code repeats the targets, view after view."""
    return model.assign(targets, F.normalize(model.prototypes.detach(), dim=1)).repeat(views, 1)


@runner("msn/loss")
def loss(case: Case) -> dict[str, Tensor]:
    anchors = case.input("anchor_views").requires_grad_()
    targets, prototypes = case.input("target_views"), case.input("prototypes")
    got: dict[str, Tensor] = {}
    for kind, iterations in (("plain", 0), ("sinkhorn", SINKHORN)):
        model = model_of(case, prototypes, iterations)
        value, terms = model.match(anchors, targets)
        got |= {
            f"{kind}.ploss": terms["cross_entropy"],
            f"{kind}.me_max": terms["prior_divergence"],
            f"{kind}.ent": terms["anchor_entropy"],
            f"{kind}.targets": assigned(model, targets, len(anchors) // len(targets)),
        }
        grads = gradients(value, anchor_views=anchors, prototypes=model.prototypes)
        got |= {f"grad.{kind}.{name}": grad for name, grad in grads.items()}
    return got


def terms_of(case: Case, prefix: str = "") -> dict[str, Tensor]:
    """Loss, terms and targets; ``prefix`` names a rank. The prototypes' labels are the identity, or smoothed."""
    prototypes, labels = case.tensors["weight.prototypes"], case.input("proto_labels").float()
    smoothing = round(1 - float(labels[0, 0] - labels[0, 1]), 6)
    same = torch.eye(len(labels)).lerp(torch.tensor(1 / len(labels)), smoothing)
    assert torch.allclose(labels, same, atol=1e-6), "labels that are no smoothed identity"
    model = model_of(case, prototypes, SINKHORN if case.config["sinkhorn"] else 0, smoothing)
    anchors, targets = case.input(f"{prefix}anchors").requires_grad_(), case.input(f"{prefix}targets")
    value, terms = model.match(anchors, targets)
    repeated = assigned(model, targets, len(anchors) // len(targets))
    got = {
        f"{prefix}loss": value,
        f"{prefix}cross_entropy": terms["cross_entropy"],
        f"{prefix}entropy": terms["anchor_entropy"],
        f"{prefix}memax": terms["prior_divergence"],
        f"{prefix}targets": repeated,
        f"{prefix}max_t": repeated.amax(1).mean(),
        f"{prefix}min_t": repeated.amin(1).mean(),
        f"{prefix}np": torch.tensor(float(len(repeated.argmax(1).unique()))),
    }
    grads = gradients(value, anchors=anchors, prototypes=model.prototypes)
    return got | {f"grad.{prefix}{name}": grad for name, grad in grads.items()}


@runner("msn/use_ent")
def with_entropy(case: Case) -> dict[str, Tensor]:
    return terms_of(case)


@runner("msn/two_rank")
def two_ranks(case: Case) -> dict[str, Tensor]:
    parts = on_ranks(case.world, lambda rank: terms_of(case, f"rank{rank}."))
    return {key: value for part in parts for key, value in part.items()}
