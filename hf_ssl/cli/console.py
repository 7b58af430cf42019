"""What every command shares: errors as one sentence, the nearest name, quiet libraries, masked secrets."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ..data.files import printable

_SECRET = re.compile(r"token$|password|passwd|secret|api_?key|credential", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")
HIDDEN = "***"


class UsageError(Exception):
    """The command line is wrong; one sentence, exit code 2."""


class CommandError(Exception):
    """The command cannot do what it was told; one sentence, exit code 1."""


class Stopped(Exception):
    """The command ended early on a signal, its state saved; exit code 128 + signal."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def quiet() -> None:
    """Silence what libraries say to developers; what hf_ssl says to its user comes through on stderr."""
    warnings.filterwarnings("ignore", module=r"(torch|transformers|datasets|accelerate|huggingface_hub|numpy)(\.|$)")
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
    logger = logging.getLogger("hf_ssl")
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(_once)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
        logger.propagate = False


class _Stderr(logging.Handler):
    """Writes to what ``sys.stderr`` is at the time, not to what it was when the first command of a process ran."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _once(record: logging.LogRecord, said: set[str] = set()) -> bool:  # noqa: B006 (of the whole process)
    """Let each broken image through once, whichever of training, the table and the report meets it."""
    message = record.getMessage()
    if not message.startswith("image left out:"):
        return True
    first = message not in said
    said.add(message)
    return first


def rank() -> int:
    """This process's number among those a launcher started; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def say(*lines: str) -> None:
    """Print on the first process only."""
    if is_main():
        print(*map(printable, lines), sep="\n", flush=True)


# --- secrets --------------------------------------------------------------------------------------------------------


def is_secret(name: str) -> bool:
    """Whether a flag's or key's name says that its value must not be written down."""
    return bool(_SECRET.search(name.replace("-", "_")))


def command_line(argv: Sequence[str]) -> str:
    """``hf-ssl`` and `argv` as one could type them, with secrets as ``***``."""
    shown, hide = [], False
    for token in argv:
        name, equals, _ = token.partition("=")
        if hide and not token.startswith("--"):
            token, hide = HIDDEN, False
        elif name.startswith("--") and is_secret(name):
            token, hide = (f"{name}={HIDDEN}", False) if equals else (token, True)
        else:
            hide = False
            token = _SECRET_VALUE.sub(HIDDEN, token)
        shown.append(token)
    return shlex.join(["hf-ssl", *shown]).replace(f"'{HIDDEN}'", HIDDEN)


def masked(value: Any, name: str = "") -> Any:
    """`value` (JSON types) with the values of secret names, and what looks like a token, as ``***``."""
    if value is not None and name and is_secret(name):
        return HIDDEN
    if isinstance(value, dict):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item) for item in value]
    return _SECRET_VALUE.sub(HIDDEN, value) if isinstance(value, str) else value
