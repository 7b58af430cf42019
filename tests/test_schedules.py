import math

import pytest
import torch

from hf_ssl import schedules


def test_cosine_by_hand() -> None:
    assert schedules.cosine(0.0, 0.996, 1.0) == pytest.approx(0.996)
    assert schedules.cosine(0.5, 0.996, 1.0) == pytest.approx(0.998)
    assert schedules.cosine(1.0, 0.996, 1.0) == pytest.approx(1.0)
    assert schedules.cosine(1 / 3, 0.0, 4.0) == pytest.approx(1.0)  # cos 60° = ½


def test_linear_by_hand() -> None:
    assert [schedules.linear(p, 2.0, 4.0, until=0.5) for p in (0.0, 0.25, 0.5, 1.0)] == [2.0, 3.0, 4.0, 4.0]
    assert schedules.linear(0.0, 2.0, 4.0, until=0.0) == 4.0


def test_warmup_cosine_by_hand() -> None:
    rates = [schedules.warmup_cosine(p, 8.0, end=2.0, warmup=0.2) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.0, 4.0, 8.0, 5.0, 2.0])
    assert schedules.warmup_cosine(0.0, 8.0) == 8.0
    assert math.isfinite(schedules.warmup_cosine(1.0, 8.0, warmup=1.0))


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.7, 1.0])
def test_tensors_give_what_floats_give(progress: float) -> None:
    point = torch.tensor(progress, dtype=torch.float64)
    assert float(schedules.cosine(point, 3.0, 1.0)) == pytest.approx(schedules.cosine(progress, 3.0, 1.0))
    for until in (0.0, 0.5):
        got = schedules.linear(point, 3.0, 1.0, until)
        assert isinstance(got, torch.Tensor) and float(got) == pytest.approx(
            schedules.linear(progress, 3.0, 1.0, until)
        )
