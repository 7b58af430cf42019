import torch
from torch import Tensor

from hf_ssl.losses import similarities
from hf_ssl.methods.joint_embedding.pmsn import PMSNConfig, PMSNForPreTraining
from tests.contract.tiny import VIT
from tests.golden.harness import Case, gradients, runner


@runner("pmsn/loss")
def loss(case: Case) -> dict[str, Tensor]:
    """The paper's loss is ours; lightly's, whose divergence runs the other way, is put together from our parts."""
    c = case.config
    anchors, prototypes = case.input("anchors").requires_grad_(), case.input("prototypes")
    config = PMSNConfig(
        backbone_config=dict(VIT), out_dim=c["k"], projection_dim=c["dim"], hidden_dim=8, temperature=c["tau"],
        sharpening=c["sharpen"], sinkhorn_iterations=c["sinkhorn"], prior_weight=c["weight"], exponent=c["exponent"],
    )  # fmt: skip
    model = PMSNForPreTraining(config)
    with torch.no_grad():
        model.prototypes.copy_(prototypes)
    paper, terms = model.match(anchors, case.input("targets"))
    leaves = {"anchors": anchors, "prototypes": model.prototypes}
    grads = gradients(paper, **leaves)
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (anchors, model.prototypes)]
    mean = similarities(*unit, c["tau"]).softmax(1).mean(0)
    prior = model.log_prior().exp()
    forward, backward = ((a * (a.log() - b.log())).sum() for a, b in ((mean, prior), (prior, mean)))
    lightly = model.match(anchors, case.input("targets"))[0] + c["weight"] * (backward - forward)
    got = {
        "paper.loss": paper, "lightly.loss": lightly, "cross_entropy": terms["cross_entropy"],
        "mean_anchor_probs": mean, "power_law": prior, "regularisation.kl_prior_to_mean": backward,
        "regularisation.kl_mean_to_prior": terms["prior_divergence"],
        **{f"grad.paper.{name}": grad for name, grad in grads.items()},
    }  # fmt: skip
    return got | {f"grad.lightly.{name}": grad for name, grad in gradients(lightly, **leaves).items()}
