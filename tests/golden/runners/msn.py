import torch
from torch import Tensor

from hf_ssl.methods.joint_embedding.msn import MSNConfig, MSNForPreTraining
from tests.contract.tiny import VIT
from tests.golden.harness import Case, gradients, runner


@runner("msn/loss")
def loss(case: Case) -> dict[str, Tensor]:
    settings = case.config
    anchors = case.input("anchor_views").requires_grad_()
    targets, prototypes = case.input("target_views"), case.input("prototypes")
    got: dict[str, Tensor] = {}
    for kind, iterations in (("plain", 0), ("sinkhorn", 3)):
        model = MSNForPreTraining(
            MSNConfig(
                backbone_config=dict(VIT),
                out_dim=len(prototypes),
                projection_dim=prototypes.shape[1],
                hidden_dim=8,
                temperature=settings.get("tau", 0.1),
                sharpening=settings.get("T", 0.25),
                sinkhorn_iterations=iterations,
                prior_weight=settings.get("memax_weight", 1.0),
                entropy_weight=settings.get("ent_weight", 0.0),
            )
        )
        with torch.no_grad():
            model.prototypes.copy_(prototypes)
        value, terms = model.match(anchors, targets)
        unit = torch.nn.functional.normalize(model.prototypes.detach(), dim=1)
        views = len(anchors) // len(targets)
        got |= {
            f"{kind}.ploss": terms["cross_entropy"],
            f"{kind}.me_max": terms["prior_divergence"],
            f"{kind}.ent": terms["anchor_entropy"],
            f"{kind}.targets": model.assign(targets, unit).repeat(views, 1),  # the official code repeats them
        }
        grads = gradients(value, anchor_views=anchors, prototypes=model.prototypes)
        got |= {f"grad.{kind}.{name}": grad for name, grad in grads.items()}
    return got
