from torch import Tensor

from hf_ssl.methods.joint_embedding.barlow_twins import barlow_terms, cross_correlation
from tests.golden.harness import Case, gradients, runner


@runner("barlow_twins/loss")
def loss(case: Case) -> dict[str, Tensor]:
    first, second = case.input("z1").requires_grad_(), case.input("z2").requires_grad_()
    correlation = cross_correlation(first, second)
    agreement, redundancy = barlow_terms(correlation)
    total = agreement + case.config.get("lambd", 0.0051) * redundancy
    grads = gradients(total, z1=first, z2=second)
    return {
        "loss": total,
        "cross_correlation": correlation,
        **{f"grad.{name}": grad for name, grad in grads.items()},
    }
