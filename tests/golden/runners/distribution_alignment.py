import copy

from torch import Tensor

from hf_ssl.semi_supervised import DistributionAlignment
from tests.golden.harness import Case, NotOurs, runner


@runner("distribution_alignment/")
def moving_average(case: Case) -> dict[str, Tensor]:
    """The peer's target follows the labelled batch before it aligns, ours after the step: labels come a step early."""
    c = case.config
    if c["kind"] != "ema":
        raise NotOurs("the moving averages are exponential, not over a queue of batches")
    alignment, got = DistributionAlignment(c["C"], c["momentum"]).train(), {}
    if "input.p_target" in case.tensors:
        alignment.labeled.copy_(case.input("p_target"))
    for step in range(c["steps"]):
        follows = c["p_target_type"] == "model"
        alignment._add(0, case.input(f"step{step}.probs_lb") if follows else alignment.labeled[None])
        alignment.update()
        if step == 0:
            alignment.started.zero_()  # no guess has come yet
        got[f"step{step}.p_target"] = alignment.labeled.clone()
        got[f"step{step}.aligned"] = alignment(case.input(f"step{step}.probs_ulb"))
        after = copy.deepcopy(alignment)
        after.update()
        got[f"step{step}.p_model"] = after.guessed
    return got
