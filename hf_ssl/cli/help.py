"""Help texts, made from the same fields that check the command line."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from .fields import UNKNOWN, Flag, method_defaults, method_views, paper, train_flags
from .plan import DEFAULTS, OWN

# The training flags most runs touch; --help-all has the rest. A test holds every name against the real fields.
FREQUENT = (
    "output_dir", "resume_from_checkpoint", "allow_changed", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "base_learning_rate", "learning_rate",
    "weight_decay", "warmup_steps", "optim", "precision", "activation_checkpointing", "torch_compile",
    "dataloader_num_workers", "seed", "logging_steps", "save_minutes", "save_steps", "save_total_limit",
    "eval_strategy", "eval_steps", "report_to",
)  # fmt: skip
_VALUES = {
    "int": "N", "float": "X", "pair": "X,Y", "numbers": "X,X,X", "list": "A,B", "dict": "JSON", "json": "JSON",
    "str": "TEXT",
}  # fmt: skip
_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<=\.) (?=[A-Z])")  # of a sentence


def flag_lines(
    flags: Iterable[Flag], defaults: Mapping[str, Any] | None = None, brief: bool = False, show_defaults: bool = True
) -> list[str]:
    """One aligned, wrapped paragraph per flag."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = []
    for flag in flags:
        kind = "float" if "float" in flag.kinds else flag.kinds[0]
        value = "" if kind == "bool" else f" {_VALUES[kind]}"
        text = _END.split(flag.help)[0] if brief else flag.help
        text = text if text.endswith("...") else text.rstrip(".")
        listed = [str(choice) for choice in flag.choices]
        if listed and len(listed) <= 8 and not any(choice in text for choice in listed):
            text += f"{': ' if text else ''}{', '.join(listed)}"
        default = (defaults or {}).get(flag.name, flag.default)
        known = default is not UNKNOWN and default is not False and default not in (None, "", [])
        if known and show_defaults:
            text += f"{' ' if text else ''}(default {default})"
        text += "." if text and not text.endswith(".") else ""
        head = f"  --{flag.name}{value}"
        body = textwrap.wrap(text, width - 36) or [""]
        if len(head) > 34:
            lines.append(head)
            head = ""
        lines += [f"{head:<36}{body[0]}".rstrip(), *[" " * 36 + line for line in body[1:]]]
    return lines


def train_help(method: str | None, everything: bool) -> str:
    """Help of ``train``: data, model, the method's own, the training flags most used (or all)."""
    flags = train_flags(method)
    defaults = {**DEFAULTS, **(method_defaults(method) if method else {})}
    groups: dict[str, list[Flag]] = {}
    for flag in flags.values():
        groups.setdefault(flag.group, []).append(flag)
    own = paper(method) if method else {}
    if method:
        teaches = own["teaches"][:1].upper() + own["teaches"][1:]
        title = f"{own['name']}: {own['title']} (arXiv:{own['arxiv']})\n{teaches}."
    else:
        title = "Train a backbone or a classifier; METHOD is one of the names that hf-ssl methods prints."
    name = method or "METHOD"
    lines = [f"usage: hf-ssl train {name} [recipe.yaml] --dataset SPEC --output_dir DIR [--flag value ...]", "", title]
    lines += ["", "A recipe is a YAML file of the same flags. Flags win over the recipe, the recipe over the paper."]
    lines += ["", "data", *flag_lines(groups["data"])]
    for kind in groups.keys() - {"data", "model", "method", "views", "training"}:
        lines += ["", kind, *flag_lines(groups[kind])]
    lines += ["", "model", *flag_lines(groups["model"])]
    if method:
        lines += ["", f"{method}'s own", *flag_lines(groups["method"])]
        lines += ["", f"views; {method} draws:", *_recipe_of_views(method)]
        lines += flag_lines(groups["views"], show_defaults=False)
    else:
        lines += ["", "the method's own: hf-ssl train METHOD --help lists its config and its views."]
    training = groups["training"] if everything else [flags[name] for name in FREQUENT]
    lines += ["", "training" if everything else "training, most used", *flag_lines(training, defaults, not everything)]
    lines += ["", "this command", *flag_lines(OWN.values())]
    if not everything:
        rest = len(groups["training"]) - len(training)
        lines += ["", f"hf-ssl train {name} --help-all lists the other {rest} training flags as well."]
    return "\n".join(lines)


def _recipe_of_views(method: str) -> list[str]:
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = []
    for group in method_views(method):
        fields = ", ".join(f"{name} {value}" for name, value in group.items() if name not in ("key", "count"))
        text = f"{group.get('count', 1)} x {group['key']}: {fields}"
        lines += textwrap.wrap(text, width - 4, initial_indent="    ", subsequent_indent="      ")
    return lines


def command_help(usage: str, summary: str, flags: Mapping[str, Flag], epilogue: str = "") -> str:
    lines = [f"usage: hf-ssl {usage}", "", summary]
    if flags:
        lines += ["", *flag_lines(flags.values())]
    if epilogue:
        lines += ["", epilogue]
    return "\n".join(lines)
