"""One process ≡ two gloo processes ≡ two accumulation micro-steps: losses, gradients, teachers, centres, norms."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.tiny import TINY
from tests.invariants.ranks import run_on_ranks
from tests.invariants.scenarios import SETTINGS, optimiser_step, scenario

# where the loss or a BatchNorm looks at the whole batch, micro-batches are another objective by definition
ACCUMULATES = [name for name, s in SETTINGS.items() if TINY[s.method].accumulates and not s.batchnorm]
NAMES = ["gather", "batchnorm", "sinkhorn", "arrival", "first", *SETTINGS, *(f"{name}/2" for name in ACCUMULATES)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_on_ranks(scenario, NAMES, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, Tensor]]:
    return {name: optimiser_step(name) for name in SETTINGS}


def assert_same(got: Any, wanted: dict[str, Tensor]) -> None:
    assert not isinstance(got, str), got
    assert set(got) == set(wanted)
    words = []
    for key, want in wanted.items():
        margin = 1e-5 * max(1.0, float(want.abs().max()))
        distance = float((got[key].double() - want.double()).abs().max())
        if not distance <= margin:
            words.append(f"{key}: off by {distance:.3g}")
    assert not words, "\n".join(words[:20])


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_are_one(name: str, ranks, reference) -> None:
    for result in ranks[name]:
        assert_same(result, reference[name])


@pytest.mark.parametrize("name", ACCUMULATES)
def test_two_micro_steps_are_one(name: str, reference) -> None:
    assert_same(optimiser_step(name, micro_batches=2), reference[name])


@pytest.mark.parametrize("name", ACCUMULATES)
def test_two_micro_steps_on_two_processes_are_one(name: str, ranks, reference) -> None:
    """Ranks are gathered micro-batch by micro-batch: the step's rows enter a queue in another order."""
    for result in ranks[f"{name}/2"]:
        assert_same(in_any_order(result), in_any_order(reference[name]))


def in_any_order(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the rows of queues, and those that waited for them, sorted by their first number."""
    assert not isinstance(result, str), result
    queues = {key for key in result if key.endswith("queue.rows") or key.endswith("queue.waiting.rows")}
    return {key: value[value[:, 0].argsort()] if key in queues else value for key, value in result.items()}


def test_the_comparison_would_notice(reference) -> None:
    """SimCLR's negatives are the batch: two micro-batches of four are another loss, and the gate says so."""
    with pytest.raises(AssertionError, match="loss0: off by"):
        assert_same(optimiser_step("simclr", micro_batches=2), reference["simclr"])
    moved = [key for key, want in reference["dino"].items() if key.startswith("state.center") and want.any()]
    assert "state.center.value" in moved  # a centre that never moves would be equal everywhere
    for name in ("fixmatch", "fixmatch-resnet"):  # a threshold that keeps all or nothing would be no threshold
        assert all(0.1 < reference[name][f"metric{step}.utilisation"] < 0.9 for step in range(2))


def test_gather_is_in_rank_order_and_its_backward_sums_over_ranks(ranks) -> None:
    everything = torch.tensor([[0.0, 1.0], [2.0, 3.0], [10.0, 11.0], [12.0, 13.0]])
    gradient = 3 * everything.flip(0)  # weight 1 from rank 0, weight 2 from rank 1
    for rank, result in enumerate(ranks["gather"]):
        assert not isinstance(result, str), result
        assert torch.equal(result["gathered"], everything)
        assert torch.equal(result["grad"], gradient[2 * rank : 2 * rank + 2])
        assert torch.equal(result["mean"], torch.tensor([1.5, 5.0]))
        assert result["weighted"] == (1 * 1 + 2 * 3) / 4  # counts 1 and 3
        assert result["nothing"].isfinite()


def test_batchnorm_over_ranks_is_batchnorm_over_the_batch(ranks) -> None:
    reference = scenario("batchnorm")
    for result in ranks["batchnorm"]:
        assert_same(result, reference)


def test_assignments_are_over_the_rows_of_all_ranks(ranks) -> None:
    reference = scenario("sinkhorn")
    assert not any(isinstance(result, str) for result in ranks["sinkhorn"]), ranks["sinkhorn"]
    together = {key: torch.cat([result[key] for result in ranks["sinkhorn"]]) for key in reference}
    assert_same(together, reference)
    assert (reference["masked"].sum(1) == 0).sum() == 2


def test_who_arrives_is_told_without_a_collective(ranks) -> None:
    for result in ranks["arrival"]:
        assert not isinstance(result, str), result
        assert result["both"] and not result["one"] and result["mean"] == 0.5


def test_all_ranks_learn_what_the_first_computed_or_raised(ranks) -> None:
    for result in ranks["first"]:
        assert_same(result, {"told": torch.tensor([1, 0, 47]), "again": torch.ones(1)})
