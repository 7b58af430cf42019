"""What must not leave the machine: tokens, and absolute paths, which name its user and its folders."""

import re
import shlex
from typing import Any

HIDDEN = "***"
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")
# An absolute path within a sentence; what follows a scheme or a word is none.
_PATH = re.compile(r"(?<![\w.~/\\:<-])(?:file://)?(?:~[\w.-]*|[A-Za-z]:)?[/\\](?=\S)[^\s'\",;:()]*")


def scrub(value: Any) -> Any:
    """`value` (JSON types) with each absolute path cut to its last part and each token as ``***``."""
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    text = _TOKEN.sub(HIDDEN, text)
    if "\n" not in text and ":" not in text[2:] and _is_path(text):  # its folders may have spaces in their names
        return _last(text)
    return _PATH.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    return "~" if name.startswith("~") else name


def _is_path(text: str) -> bool:
    return re.match(r"/|\\\\|~[\w.-]*[/\\]|[A-Za-z]:[/\\]", text) is not None


def scrub_command(command: str) -> str:
    """A command line with the paths of its values cut to their last part and its tokens as ``***``."""
    try:
        words = shlex.split(command)
    except ValueError:  # no quoting that a shell understands
        return str(scrub(command))
    shown = []
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        shown.append(f"{name}{equals}{scrub(value)}")
    return shlex.join(shown).replace(f"'{HIDDEN}'", HIDDEN)
