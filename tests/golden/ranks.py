"""Several ranks in one process, for golden cases that were recorded on several: our own collectives run, unchanged."""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_ssl import distributed


class _Group:
    """Stands in for ``torch.distributed`` within ``hf_ssl.distributed``.

    Ranks are threads of which one runs at a time: they change over at collectives alone, so that nothing races.
    """

    ReduceOp = dist.ReduceOp

    def __init__(self, world: int):
        self.world, self.turn, self.local = world, threading.Condition(), threading.local()
        self.given: dict[int, Tensor] = {}
        self.rounds: list[list[Tensor]] = []
        self.error: BaseException | None = None

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self) -> int:
        return self.world

    def get_rank(self) -> int:
        return self.local.rank

    def all_gather(self, parts: list[Tensor], x: Tensor) -> None:
        for part, given in zip(parts, self._exchange(x), strict=True):
            part.copy_(given)

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        given = torch.stack(self._exchange(x))
        x.copy_(given.amax(0) if op == dist.ReduceOp.MAX else given.sum(0))

    def _exchange(self, x: Tensor) -> list[Tensor]:
        mine = len(self.rounds)
        self.given[self.get_rank()] = x.detach().clone()
        if len(self.given) == self.world:
            self.rounds.append([self.given[rank] for rank in range(self.world)])
            self.given = {}
            self.turn.notify_all()
        while len(self.rounds) == mine:
            if self.error is not None or not self.turn.wait(60):
                raise RuntimeError("another rank failed, or did not take part in a collective")
        return self.rounds[mine]

    def run(self, rank: int, function: Callable[[int], Any], results: list[Any]) -> None:
        self.local.rank = rank
        with self.turn:
            try:
                results[rank] = function(rank)
            except BaseException as error:
                self.error = self.error or error
            finally:
                self.turn.notify_all()


def on_ranks(world: int, function: Callable[[int], Any]) -> list[Any]:
    """``function(rank)`` on every rank; its results in rank order. The first error of a rank is raised."""
    group, results, real = _Group(world), [None] * world, distributed.dist
    distributed.dist = group  # type: ignore[assignment]
    try:
        threads = [threading.Thread(target=group.run, args=(rank, function, results)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        distributed.dist = real
    if group.error is not None:
        raise group.error
    return results
