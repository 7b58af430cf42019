"""``hf-ssl``: the command line. Commands, flags and recipes are checked before anything heavy is imported."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..data.files import printable
from ..spelling import nearest
from .console import CommandError, Stopped, UsageError, is_main

_COMMANDS = {
    "demo": "train on the built-in emoji for about 5 minutes: no argument, no network, no GPU",
    "train": "METHOD [recipe.yaml] --dataset SPEC --output_dir DIR: images in, a backbone out",
    "evaluate": "MODEL --dataset SPEC: kNN, accuracy or zero-shot, as suits the model, beside its baselines",
    "embed": "MODEL --dataset SPEC --output FILE: one feature vector per image",
    "pseudo-label": "MODEL --dataset SPEC --output FILE.parquet: a classifier's own labels, with confidences",
    "export": "RUN_OR_CHECKPOINT --output DIR: a folder that plain transformers loads",
    "publish": "RUN REPO: check it and push it to the Hub, in one commit",
    "convert": "FILE --output DIR: an official .pth, .pt or .safetensors, as a folder that plain transformers loads",
    "report": "RUN: one self-contained report.html with curves and pictures",
    "methods": "what can be trained, with its paper",
}


@dataclass(frozen=True)
class _Command:
    usage: str
    flags: tuple
    run: Callable


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 (could not be done), 2 (wrong usage), 130 or 143 (stopped)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Waiting OpenMP threads spin by default: a training step beside another busy process took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = os.environ.get("HF_SSL_DEBUG") == "1" or any(a.replace("-", "_") == "__debug_traceback" for a in argv)
    try:
        return _dispatch(argv)
    except UsageError as error:
        return _complain(error, 2, debug)
    except Stopped as stop:
        return _complain(stop, stop.code, False)
    except KeyboardInterrupt:
        return _complain("Interrupted.", 130, debug)
    except BrokenPipeError:  # `hf-ssl methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except CommandError as error:
        return _complain(error, 1, debug)
    except Exception as error:
        from .faults import sentence

        if (said := sentence(error)) is None:
            raise
        return _complain(error, 1, debug, said)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from .. import __version__

        print(f"hf-ssl {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in _COMMANDS:
        near = nearest(name, _COMMANDS)
        hint = f"the nearest is {near}" if near else f"there are {', '.join(_COMMANDS)}"
        raise UsageError(f"there is no command {name!r}; {hint}.")
    wants_help = [word for word in rest if word in ("-h", "--help", "--help-all", "--help_all")]
    if name == "train":
        return _train(rest, wants_help)
    from .flags import parse
    from .help import command_help

    command = _command(name)
    # the traceback switch belongs to every command and is read before all else
    rest = [word for word in rest if word.replace("-", "_") != "__debug_traceback"]
    flags = {flag.name: flag for flag in command.flags}
    if wants_help:
        print(command_help(command.usage, f"{_COMMANDS[name].partition(': ')[2] or _COMMANDS[name]}.", flags))
        return 0
    return command.run(parse(rest, flags, name))


def _train(argv: list[str], wants_help: list[str]) -> int:
    if wants_help:
        from .help import train_help
        from .plan import check_method, first_word

        method = first_word(argv)
        print(train_help(check_method(method) if method else None, wants_help[0] not in ("-h", "--help")))
        return 0
    from .train import train

    return train(argv)


def _command(name: str) -> _Command:
    if name == "demo":
        from .demo import FLAGS, demo

        return _Command("demo [--steps N] [--output_dir DIR]", FLAGS, demo)
    if name == "publish":
        from .publish import FLAGS, publish

        return _Command("publish RUN REPO [--private] [--revision BRANCH]", FLAGS, publish)
    if name == "convert":
        from .convert import FLAGS, convert

        return _Command("convert FILE --output DIR [--method METHOD]", FLAGS, convert)
    from . import commands

    return {
        "evaluate": _Command("evaluate MODEL --dataset SPEC [...]", commands.EVALUATE, commands.evaluate),
        "embed": _Command("embed MODEL --dataset SPEC --output FILE [...]", commands.EMBED, commands.embed),
        "pseudo-label": _Command(
            "pseudo-label MODEL --dataset SPEC --output FILE.parquet", commands.PSEUDO_LABEL, commands.pseudo_label
        ),
        "export": _Command("export RUN_OR_CHECKPOINT --output DIR", commands.EXPORT, commands.export),
        "report": _Command("report RUN", commands.REPORT, commands.report),
        "methods": _Command("methods [--json]", commands.METHODS_FLAGS, commands.methods),
    }[name]


def _overview() -> str:
    lines = ["usage: hf-ssl COMMAND ...", "", "Visual self- and semi-supervised learning for plain transformers.", ""]
    for name, text in _COMMANDS.items():
        lines.append(f"  {name:<14}{text}")
    lines += ["", "hf-ssl COMMAND --help says more; hf-ssl train METHOD --help lists a method's own flags."]
    return "\n".join(lines)


def _complain(error: object, code: int, debug: bool, said: str | None = None) -> int:
    """One sentence on stderr; the traceback as well where it was asked for."""
    if debug and isinstance(error, BaseException):
        traceback.print_exception(error)
    words = printable(" ".join((said or str(error)).split())) or type(error).__name__
    where = "" if is_main() else f" (process {os.environ.get('RANK')})"
    print(f"hf-ssl{where}: {words}", file=sys.stderr, flush=True)
    return code
