"""Real gloo processes: run named scenarios on every rank, bring the results back as tensors."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import PATIENCE

WORLD = 2


def run_on_ranks(function: Callable[[str], Any], names: list[str], folder: Path) -> dict[str, list[Any]]:
    """``function(name)`` for every name on WORLD gloo processes: {name: [result of rank 0, result of rank 1]}.

    An error on a rank is returned as its traceback, a string; the other scenarios still run.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # One server imports torch and transformers once, both ranks are forked from it before any thread exists.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.invariants.scenarios"])
    processes = [
        context.Process(target=_rank, args=(function, names, rank, port, str(folder)), daemon=True)
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]
    late = f"no result after {PATIENCE} seconds"
    return {name: [result.get(name, late) for result in results] for name in names}


def _rank(function: Callable[[str], Any], names: list[str], rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    results = {}
    for name in names:
        try:
            results[name] = function(name)
        except Exception:
            results[name] = traceback.format_exc()
        torch.save(results, Path(folder, f"rank{rank}.pt"))
        if isinstance(results[name], str):
            break  # the ranks are out of step from here on
    for name in names:
        results.setdefault(name, "not run: an earlier scenario failed on this rank")
    torch.save(results, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()
