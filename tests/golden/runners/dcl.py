from torch import Tensor

from hf_ssl.methods.joint_embedding.dcl import dcl
from tests.golden.harness import Case, gradients, runner


@runner("dcl/loss")
def loss(case: Case) -> dict[str, Tensor]:
    first, second = case.input("z0").requires_grad_(), case.input("z1").requires_grad_()
    got = {}
    for name, sigma in (("dcl", None), ("dclw", case.config["sigma"])):
        losses, _ = dcl(first, second, case.config["temperature"], sigma)
        there, back = losses.chunk(2)  # the reference is one-way: anchors of one view alone
        got |= {f"reference_one_way.{name}01": there.mean(), f"reference_one_way.{name}10": back.mean()}
        got[f"{name}.loss"] = losses.mean()
        got |= {f"grad.{name}.{k}": grad for k, grad in gradients(losses.mean(), z0=first, z1=second).items()}
    return got
