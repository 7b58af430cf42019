"""Reading over HTTP: what fails for a moment is asked for again, what is gone is reported.

What the libraries repeat by themselves (huggingface_hub 2.4, datasets 5.2): ranges of a file and listings, 5 times
over 23 s; a read that lost its connection, 20 times. Not repeated: the questions which files a repo has, where a file
lies, and whatever still fails after those tries. That is done here, on top: a shard goes on at the row where it broke.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pyarrow as pa

logger = logging.getLogger("hf_ssl.data")

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0)  # seconds before each repetition
_SECONDS = 30.0  # for one file of the web
AT_START = 3  # repetitions while a person waits for a run to begin
_BUSY = (408, 425, 429, 500, 502, 503, 504)
Result = TypeVar("Result")


class RemoteError(ValueError):
    """Something cannot be read over the network, now or ever; the message says which and what to do."""


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an error of huggingface_hub carries; None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later: a broken connection, a busy server."""
    if "OfflineModeIsEnabled" in (type(error).__name__, str(error).rpartition("(")[2].rstrip(")")):
        return False  # `datasets` tells it in the text of a ConnectionError
    if (status := http_status(error)) is not None:
        return status in _BUSY
    # httpx, httpx2 and aiohttp name the same things; which of them is installed depends on the version
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "aiohttp"):
        return any(base.__name__ in ("TransportError", "ClientError") for base in type(error).__mro__)
    return isinstance(error, (ConnectionError, TimeoutError))


def steadily(call: Callable[[], Result], what: str, repetitions: int = len(WAITS)) -> Result:
    """``call()``, repeated with growing waits while the network fails. RemoteError, naming ``what``, in the end."""
    attempt = 0
    while True:
        try:
            return call()
        except Exception as error:
            wait_or_raise(error, what, attempt, repetitions)
            attempt += 1


def wait_or_raise(error: BaseException, what: str, attempt: int, repetitions: int = len(WAITS)) -> None:
    """Wait before repetition number ``attempt``, or raise: RemoteError of the network, anything else as it is."""
    causes = list(_causes(error))
    transient = any(is_transient(cause) for cause in causes)
    if not transient and any(_is_gone(cause) for cause in causes):
        raise RemoteError(
            f"{what} is gone: {_said(error)} Was it removed or renamed while it was read, or is the access lost? Put "
            "it back, or train on a copy or on a fixed revision."
        ) from error
    if not transient:
        raise error
    if attempt >= repetitions:
        raise RemoteError(
            f"{what} could not be read for {sum(WAITS[:attempt]):.0f} seconds and {attempt + 1} tries: {_said(error)} "
            "Check the network, then go on from the checkpoint."
        ) from error
    logger.warning("%s: %s Again in %g s.", what, _said(error), WAITS[attempt])
    time.sleep(WAITS[attempt])


def resumed(tables: Callable[[], Iterator[pa.Table]], what: str) -> Iterator[pa.Table]:
    """The tables of a shard; where reading breaks it is opened again and what was already handed out is left out.

    ``tables`` must give the same rows in the same order every time; how they are cut into tables may differ.
    """
    done, attempt = 0, 0
    while True:
        skip = done
        try:
            for table in tables():
                fresh = table.slice(min(skip, table.num_rows))
                skip -= table.num_rows - fresh.num_rows
                if fresh.num_rows:
                    yield fresh
                    done, attempt = done + fresh.num_rows, 0
            return
        except Exception as error:
            wait_or_raise(error, f"{what}, row {done}", attempt)
            attempt += 1


def is_of_hub(address: str) -> bool:
    """Whether it is a file of the Hub, or one in an archive there."""
    return address.rpartition("::")[2].startswith("hf://")


def read(address: str) -> bytes:
    """A file by its address (hf://, https://, ...). RemoteError where it cannot be read.

    The Hub, which a whole data set is streamed from, is waited for as `steadily` does; any other address half a minute
    at a time, twice, so that rows that name dead ones do not hold a run up for long.
    """
    import fsspec

    options: dict = {}
    if address.startswith(("http://", "https://")):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=_SECONDS)}

    def whole() -> bytes:
        with fsspec.open(address, "rb", **options) as file:
            return file.read()

    return steadily(whole, address, len(WAITS) if is_of_hub(address) else 1)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from: `datasets` says "not found" of a repo whose server was busy."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_gone(error: BaseException) -> bool:
    return http_status(error) in (401, 403, 404, 410) or isinstance(error, FileNotFoundError)


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    status = http_status(error)
    named = f"the server says {status}" if status else type(error).__name__
    return f"{named}: {text}{'' if text.endswith('.') else '.'}" if text else f"{named}."
