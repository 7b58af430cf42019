"""Which errors of the libraries below are the user's to mend, in a sentence each. All others keep their traceback."""

from __future__ import annotations

import re
from typing import Any

from ..files import is_disk_full

_HINT = "HF_SSL_DEBUG=1 shows where."
_OF_FILES = ("SafetensorError", "UnpicklingError")
_OURS = ("TooManyBadImages", "NonFiniteError", "WorkerError", "StrictDataclassFieldValidationError")
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.IGNORECASE)
_ARGUMENT = re.compile(r"unexpected keyword argument|required (positional|keyword-only) argument")


def sentence(error: Exception) -> str | None:
    """What to tell the user of ``error``; None for a mistake of ours, whose traceback is needed."""
    from ..loading import raised_in

    words, kind = _words(error), type(error).__name__
    if kind == "WriteError":  # it says itself what is full, and what to do
        return words
    if is_disk_full(error):
        return f"The disk is full: free some space and run the command again ({words})."
    if is_out_of_memory(error):
        return f"The memory is full: take a smaller batch or model ({_first(words)})."
    if isinstance(error, ImportError):
        return _missing(error, words, raised_in(error))
    if isinstance(error, OSError):
        return _of_a_file(error, words)
    if isinstance(error, ValueError) or kind in _OURS:
        return words
    if kind in _OF_FILES:
        return _first(words)
    home = raised_in(error)
    if home in ("hf_ssl", "") or isinstance(error, RecursionError):
        return None
    if isinstance(error, RuntimeError) or (isinstance(error, TypeError) and _ARGUMENT.search(words)):
        return f"{home} refuses: {_first(words)} {_HINT}"
    if isinstance(error, KeyError) and " " in words:  # a sentence, not a name that was looked up
        return words.strip("\"'")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error))))


def _words(error: BaseException) -> str:
    """The message in one line; of an error in a data worker its own message, without the worker's traceback."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2] or text
    return " ".join(text.split()) or type(error).__name__


def _first(words: str) -> str:
    """The first 300 letters, ended as a sentence."""
    words = words[:300].rstrip()
    return words if words.endswith((".", "!", "?")) else f"{words}."


def _missing(error: ImportError, words: str, home: str) -> str | None:
    """A package that is not installed; None where hf_ssl imports a name of its own that is not there."""
    name = str(error.name or "")
    if type(error).__name__ == "PackageNotFoundError":  # importlib.metadata: the requirement stands in quotes
        wanted = re.search(r"'([^']+)'", name)
        return f"A package is not installed: pip install '{wanted[1] if wanted else name}'."
    if isinstance(error, ModuleNotFoundError) and not name.startswith("hf_ssl"):
        return f"The package {name.partition('.')[0]} is not installed: pip install {name.partition('.')[0]}."
    return _first(words) if home != "hf_ssl" else None


def _of_a_file(error: OSError, words: str) -> str:
    if error.errno is None or not error.filename:
        return words
    return f"{error.filename}: {error.strerror}."


def largest(values: dict[str, Any], count: int = 3) -> str:
    """The fields with the largest whole numbers: "projection_dim 1000000000, num_layers 3"."""
    numbers = {k: v for k, v in values.items() if isinstance(v, int) and not isinstance(v, bool)}
    return ", ".join(f"{k} {numbers[k]}" for k in sorted(numbers, key=numbers.__getitem__, reverse=True)[:count])
