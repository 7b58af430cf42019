"""DataLoader workers: how they start, what they send, and how long they are waited for.

What torch leaves open: a batch that finds no room in /dev/shm is dropped by a background thread, and its reader waits
for ever; a dead worker is raised wherever the process is by then, in the middle of a checkpoint too.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

SECONDS = 1800  # without any batch, until the workers are given up; slow disks and networks need minutes at most
_POLL = 1  # seconds between two looks at what else there is to do
_PATIENCE = 10  # seconds without a batch after which a run that was told to end waits no longer
_QUEUES = 1 << 15  # bytes of shared memory for the semaphores of one worker's queues
_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_TORCHS = "torch.utils.data._utils.signal_handling"


class WorkerError(RuntimeError):
    """The data-loading workers cannot go on; the message says why and what to do."""


class WaitEnded(RuntimeError):
    """The wait for a batch was given up because the run was asked to end."""


class Shared:
    """A collate function whose tensors lie in shared memory when it returns, where workers run it.

    The background thread that sends a batch would move them there as well; an error in that thread is lost.
    """

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, rows: list) -> Any:
        batch = self.collate(rows)
        if torch.utils.data.get_worker_info() is not None:
            share(batch)
        return batch


def share(value: Any) -> Any:
    """Moves every tensor in `value` (dicts, lists and tuples of them) to shared memory. WorkerError: it is full."""
    if isinstance(value, torch.Tensor):
        try:
            value.share_memory_()
        except RuntimeError as error:
            if "Too many open files" not in str(error):
                raise WorkerError(_no_room(value.nbytes)) from None
            raise WorkerError(
                "The workers have too many files open to share another batch: raise the limit (ulimit -n), or use "
                "fewer workers (--dataloader_num_workers)."
            ) from None
    elif isinstance(value, dict):
        share(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, (torch.Tensor, dict, list, tuple)):
                share(item)
    return value


def start(loader: torch.utils.data.DataLoader) -> Iterator:
    """`iter(loader)`. WorkerError where there is no room for the workers' queues."""
    if loader.num_workers and (free := _free()) is not None and free < _QUEUES * loader.num_workers:
        raise WorkerError(_no_room(0))
    with _signals_blocked() if loader.worker_init_fn is prepare else nullcontext(), _handler_kept():
        return iter(loader)


def iterate(loader: torch.utils.data.DataLoader) -> Iterator:
    """All batches of a loader whose timeout is `poll(workers)`; errors as `next_batch`."""
    batches = start(loader)
    while True:
        try:
            batch = next_batch(batches)
        except StopIteration:
            return
        yield batch


def stop(batches: Iterator) -> None:
    """End the workers of an iterator that `start` returned; one that hangs is killed after some seconds."""
    if not hasattr(batches, "_shutdown_workers"):
        return
    with suppress(RuntimeError):  # raised by torch's handler when a worker died just now
        batches._shutdown_workers()
    for worker in getattr(batches, "_workers", ()):
        if worker.is_alive():
            worker.kill()
            worker.join(1)


def next_batch(batches: Iterator, ended: Callable[[], bool] = lambda: False, where: str = "") -> Any:
    """The next batch of a loader that `start` started and whose timeout is `poll(workers)`. StopIteration at its end.

    `ended` is asked every second. Raises WaitEnded some seconds after it said yes, WorkerError for a dead worker and
    after `SECONDS` without a batch, and what a worker raised, as its sentence alone where it is one of ours.
    """
    waited = ending = 0.0
    while True:
        try:
            return next(batches)
        except Exception as error:  # which one depends on what the worker was about to send
            if isinstance(error, StopIteration):
                raise
            if not str(error).startswith("DataLoader timed out"):
                if (explained := _explained(error, batches, where)) is error:
                    raise
                raise explained from error
        waited += _POLL
        ending += _POLL * ended()
        if ending >= _PATIENCE:
            raise WaitEnded("The wait for a batch was ended.")
        if waited >= SECONDS:
            raise WorkerError(
                f"No batch came from the data-loading workers for {SECONDS / 60:.0f} minutes. Is the disk or the "
                "network that holds the images out of reach? With --dataloader_num_workers 0 the training process "
                "reads them itself and says where it waits."
            )


def poll(workers: int) -> float:
    """The `timeout` that a DataLoader for `next_batch` needs."""
    return _POLL if workers else 0


def prepare(worker: int) -> None:
    """A worker's start: one thread; the first SIGTERM and Ctrl-C, which go to the whole group, are the trainer's."""
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a second SIGTERM ends the worker: Python sends one to what is left at its end
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _explained(error: Exception, batches: Iterator, where: str) -> Exception:
    """The error to raise for one that `next` raised."""
    kind, text = type(error), str(error)
    if text.startswith(f"Caught {kind.__name__} in DataLoader worker"):
        if not kind.__module__.startswith("hf_ssl."):
            return error
        return kind(re.split(rf"\n\S*{kind.__name__}: ", text)[-1].strip())
    workers = getattr(batches, "_workers", ())
    dead = [worker for worker in workers if not worker.is_alive() and worker.exitcode]
    if dead or "DataLoader worker (pid" in text or (workers and isinstance(error, (ConnectionError, EOFError))):
        codes = sorted({_signal_name(-worker.exitcode) for worker in dead if (worker.exitcode or 0) < 0})
        how = f" (killed by {', '.join(codes)})" if codes else ""
        return WorkerError(
            f"A data-loading worker died{where}{how}. It was most likely killed for memory: use fewer workers "
            "(--dataloader_num_workers) or a smaller batch."
        )
    return error


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _free() -> int | None:
    """Bytes that are free in the shared memory; None where it has no folder."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _no_room(needed: int) -> str:
    free = _free()
    place = "/dev/shm" if free is None else f"/dev/shm, where {free / 1e6:,.1f} MB are free"
    what = f"a tensor of {needed / 1e6:,.1f} MB" if needed else "the workers' queues"
    return (
        f"There is no room in the shared memory ({place}) for {what}: use fewer workers "
        "(--dataloader_num_workers 0 needs none of it) or a smaller batch, or give the container more of it "
        "(docker run --shm-size 8g)."
    )


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A worker inherits the block and lifts it when it is ready, so that no signal finds it half started."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handler_kept() -> Iterator[None]:
    """Takes back torch's handler of dead children; `next_batch` looks after the workers itself."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        torchs = getattr(before, "__module__", None) == _TORCHS
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs or before is None else before)
