"""One process: every function is the identity or the plain module. Ranks: tests/invariants."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_ssl import distributed


def test_one_process_is_the_identity() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.world_size() == 1 and distributed.rank() == 0
    assert distributed.gather_with_grad(x) is x
    mean = distributed.all_mean(x, 5.0)
    assert torch.equal(mean, x) and not mean.requires_grad and mean.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (8, 4)), (nn.BatchNorm2d, (8, 4, 3, 3))])
def test_synchronised_norm_is_the_plain_norm_in_one_process(kind: type, shape: tuple) -> None:
    plain = nn.Sequential(kind(4))
    synchronised = distributed.synchronise_batchnorm(nn.Sequential(kind(4)))
    assert type(synchronised[0]) is distributed.CrossRankBatchNorm
    assert list(plain.state_dict()) == list(synchronised.state_dict())
    x = torch.randn(shape)
    for mode in (True, False):
        assert torch.equal(plain.train(mode)(x), synchronised.train(mode)(x))
    assert torch.equal(plain[0].running_var, synchronised[0].running_var)
    with pytest.raises(ValueError, match="needs"):
        synchronised[0](torch.randn(4))


def test_alone_there_are_no_other_ranks(tmp_path) -> None:
    """A process of a world of two that never meets the other: only ``alone`` lets it compute."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend
    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    torch.distributed.init_process_group("fake", store=store, rank=1, world_size=2)
    try:
        assert (distributed.world_size(), distributed.rank()) == (2, 1)
        with distributed.alone():
            x = torch.randn(3, 2)
            assert (distributed.world_size(), distributed.rank()) == (1, 0)
            assert distributed.gather_with_grad(x) is x
        assert distributed.world_size() == 2
    finally:
        torch.distributed.destroy_process_group()


def test_sinkhorn_by_hand() -> None:
    """Two scalings of columns to equal sums, then of rows to 1 (SwAV, section 3.1)."""
    scores = torch.randn(5, 3)
    q = (scores.double() / 0.5).exp()
    for _ in range(2):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    torch.testing.assert_close(distributed.sinkhorn(scores, 0.5, 2), q.float())
    assert not distributed.sinkhorn(scores.requires_grad_(), 0.5, 2).requires_grad


def test_sinkhorn_shares_the_columns_out_equally() -> None:
    scores = torch.randn(40, 4) + torch.tensor([3.0, 0.0, 0.0, 0.0])  # all rows prefer the first
    assignment = distributed.sinkhorn(scores, 0.5, 100)
    torch.testing.assert_close(assignment.sum(1), torch.ones(40))
    torch.testing.assert_close(assignment.sum(0), torch.full((4,), 10.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_survives_scores_beyond_the_range_of_exp(iterations: int) -> None:
    """dinov2 PR#583: exp(scores / epsilon) overflows; and a row far below the largest one must not vanish."""
    scores = torch.randn(6, 4) + torch.tensor([0.0, 30.0, -30.0, 200.0, -500.0, 1000.0])[:, None]
    assignment = distributed.sinkhorn(scores, 0.05, iterations)
    assert assignment.isfinite().all()
    torch.testing.assert_close(assignment.sum(1), torch.ones(6))
    q = scores.double() / 0.05
    for _ in range(iterations):
        q = q - q.logsumexp(0)
        q = q - q.logsumexp(1, keepdim=True)
    torch.testing.assert_close(assignment, q.exp().float(), rtol=0, atol=5e-3)  # float32 of 20,000 has no more


def test_sinkhorn_counts_no_masked_row() -> None:
    scores = torch.randn(5, 3)
    masked = torch.cat([scores, torch.full((4, 3), float("-inf"))])
    for iterations in (0, 1, 3):
        wanted = distributed.sinkhorn(scores, 0.5, iterations)
        assignment = distributed.sinkhorn(masked, 0.5, iterations)
        torch.testing.assert_close(assignment, torch.cat([wanted, torch.zeros(4, 3)]))
    assert distributed.sinkhorn(scores[:0], 0.5, 3).shape == (0, 3)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
def test_no_thread_of_gloo_outlives_a_group_that_a_reference_cycle_keeps() -> None:
    """Such a thread aborts a process that ends: "terminate called without an active exception"."""
    before = threads()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    torch.distributed.all_reduce(torch.ones(2))
    keeper: list[Any] = [torch.distributed.group.WORLD]
    keeper.append(keeper)
    assert threads() > before
    del keeper
    distributed.leave()
    assert threads() == before and not torch.distributed.is_initialized()
    distributed.leave()  # there is none left


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))
