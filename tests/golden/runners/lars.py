from torch import Tensor, nn

from hf_ssl.training.lars import LARS
from tests.golden.harness import Case, runner


def run(case: Case, trust: float, decay_vectors: bool, adapt_vectors: bool) -> dict[str, Tensor]:
    """LARS with one group per parameter: 1-D parameters may be left out of the decay and of the adaptation."""
    settings = case.config["lars"]
    parameters = [nn.Parameter(case.input(f"p{index}")) for index in range(len(case.config["shapes"]))]
    groups = [
        {
            "params": [parameter],
            "weight_decay": settings["weight_decay"] if parameter.ndim > 1 or decay_vectors else 0.0,
            "always_adapt": parameter.ndim > 1 or adapt_vectors,
        }
        for parameter in parameters
    ]
    optimizer = LARS(groups, lr=settings["lr"], momentum=settings["momentum"], trust_coeff=trust)
    got = {}
    for step in range(case.config["steps"]):
        for index, (group, parameter) in enumerate(zip(optimizer.param_groups, parameters, strict=True)):
            group["lr"] = case.config["lrs"][step]
            parameter.grad = case.input(f"grad{step}.p{index}")
        optimizer.step()
        got |= {f"step{step}.p{index}": p.detach().clone() for index, p in enumerate(parameters)}
    return got


@runner("lars/barlow")
def barlow(case: Case) -> dict[str, Tensor]:
    lars = case.config["lars"]
    return run(
        case,
        lars.get("eta", 0.001),
        not lars.get("weight_decay_filter", False),
        not lars.get("lars_adaptation_filter", False),
    )


@runner("lars/mocov3")
def mocov3(case: Case) -> dict[str, Tensor]:
    return run(case, case.config["lars"].get("trust_coefficient", 0.001), False, False)


@runner("lars/vicreg")
def vicreg(case: Case) -> dict[str, Tensor]:
    """Its filters are functions or None, recorded as anything or null; unrecorded, they are those of its training."""
    lars = case.config["lars"]
    return run(
        case,
        lars.get("eta", 0.001),
        not lars.get("weight_decay_filter", True),
        not lars.get("lars_adaptation_filter", True),
    )
