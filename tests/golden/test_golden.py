"""Every golden case of --golden-dir against our code, by the case's own tolerance."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tests.golden.runners  # noqa: F401  (registers)
from hf_ssl import distributed
from hf_ssl.methods import METHODS
from tests.golden.harness import (
    NO_METHOD,
    OUR_NAMES,
    RUNNERS,
    WITHOUT,
    WITHOUT_RUNNER,
    Case,
    NotOurs,
    differences,
    discover,
    our_name,
    plan,
    runner_of,
    without,
)
from tests.golden.ranks import on_ranks

KINDS = set(METHODS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" not in metafunc.fixturenames:
        return
    folders = discover(Path(metafunc.config.getoption("golden_dir")))
    cases, missing = plan(folders, KINDS)
    metafunc.config.stash[WITHOUT_RUNNER] = missing
    metafunc.parametrize("golden", list(cases.values()), ids=list(cases))


def test_case_matches_the_official_numbers(golden: Path) -> None:
    case = Case.load(golden)
    run = runner_of(case.name)
    assert run is not None, (
        f"no golden runner for {case.name}: add one to tests/golden/runners (there are {list(RUNNERS)})"
    )
    try:
        got = run(case)
    except NotOurs as why:
        pytest.xfail(str(why))
    words = differences(case, got)
    assert not words, "\n".join([case.name, *words])
    if left_out := without(case):  # never passed: reported with its reasons, by `pytest -rx`
        pytest.xfail("; ".join(f"{name}: {why}" for name, why in left_out.items()))


# --- the harness itself -------------------------------------------------------------------------------------------


def made_up(expected: dict[str, torch.Tensor]) -> Case:
    return Case("m/kind_a", {}, {"rtol": 0.0, "atol": 0.1}, {f"expected.{name}": t for name, t in expected.items()})


@pytest.mark.parametrize(
    ("got", "word"),
    [
        ({"loss": torch.tensor(1.05)}, None),
        ({"loss": torch.tensor(1.2)}, "off by"),
        ({"loss": torch.tensor(float("nan"))}, "off by"),
        ({"loss": torch.ones(2)}, "shape"),
        ({}, "no such tensor"),
    ],
)
def test_a_difference_is_never_passed_over(got: dict, word: str | None) -> None:
    words = differences(made_up({"loss": torch.tensor(1.0)}), got)
    assert bool(words) == (word is not None)
    assert word is None or word in words[0]


def test_other_oracles_are_held_against_our_value() -> None:
    case = made_up({"x.loss": torch.tensor(1.0), "peer_oracle.loss": torch.tensor(2.0)})
    assert differences(case, {"x.loss": torch.tensor(1.0)}) == ["peer_oracle.loss: off by 1, allowed 0.1"]


def test_the_longest_kind_wins_and_no_kind_gives_none() -> None:
    assert runner_of("mae/model_of_another_size_b") is RUNNERS["mae/model"]
    assert runner_of("knn/dino_knn_k200") is RUNNERS["knn/dino_knn"]
    assert runner_of("dino/unheard_of_a") is None


def test_cases_without_a_runner_fail_or_are_listed(tmp_path: Path) -> None:
    for name in ("dino/unheard_of_a", "nomethod/loss_a", "dino/loss_z"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "case.json").write_text(json.dumps({"config": {}, "tolerance": {"rtol": 0, "atol": 0}}))
        save_file({"expected.x": torch.zeros(1)}, folder / "tensors.safetensors")
    cases, missing = plan(discover(tmp_path), {"dino"})
    assert missing == [("dino/unheard_of_a", True), ("nomethod/loss_a", False)]
    assert list(cases) == ["dino/loss_z", "dino/unheard_of_a"]
    with pytest.raises(AssertionError, match="no golden runner for dino/unheard_of_a"):
        test_case_matches_the_official_numbers(cases["dino/unheard_of_a"])


def test_a_case_that_ours_has_not_all_of_is_compared_and_never_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNNERS, "m/kind", lambda case: {})
    monkeypatch.setitem(WITHOUT, "m/kind", {"running_": "ours keeps none"})
    case = made_up({"loss": torch.tensor(1.0), "running_mean": torch.tensor(1.0)})
    assert without(case) == {"running_mean": "ours keeps none"}
    assert differences(case, {"loss": torch.tensor(1.0)}) == []
    assert differences(case, {"loss": torch.tensor(2.0)}) == ["loss: off by 1, allowed 0.1"]


def test_a_folder_of_another_name_belongs_to_our_method() -> None:
    assert {our_name(f"{folder}/case_a") for folder in OUR_NAMES} <= KINDS
    assert not NO_METHOD & KINDS


def test_ranks_run_our_own_collectives() -> None:
    def rank(number: int) -> tuple:
        rows = torch.full((2, 1), float(number + 1)).requires_grad_()
        (distributed.gather_with_grad(rows).sum() * (number + 1)).backward()
        return distributed.rank(), distributed.all_mean(rows.detach().mean()), rows.grad

    assert distributed.world_size() == 1
    for number, (own, mean, grad) in enumerate(on_ranks(3, rank)):
        assert own == number and mean == 2 and torch.equal(grad, torch.full((2, 1), 6.0))
    assert distributed.world_size() == 1
    with pytest.raises(ValueError, match="rank 1"):
        on_ranks(2, lambda number: fail(number) if number else distributed.all_mean(torch.ones(1)))


def fail(rank: int) -> None:
    raise ValueError(f"rank {rank}")


def test_a_wrong_folder_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(pytest.UsageError):
            discover(folder)
