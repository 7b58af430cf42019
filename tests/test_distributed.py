"""One process: every function is the identity or the plain module. Ranks: tests/invariants."""

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
