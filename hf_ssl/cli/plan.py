"""What a ``train`` command line asks for, settled before torch is imported: method, recipe, and every value."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..methods import METHODS
from ..spelling import nearest
from ..training.levels import RIVALS, merge
from .console import UsageError
from .fields import Flag, config_flags, kind_flags, stated, train_flags
from .flags import parse
from .recipes import default_recipe, read_recipe

# Flags of the command itself, beside the fields of the arguments, the config and the views.
OWN = {
    flag.name: flag
    for flag in (
        Flag("overwrite", ("bool",), False, "Replace the run that output_dir already holds."),
        Flag("no_report", ("bool",), False, "Do not write report.html."),
        Flag("no_evaluation", ("bool",), False, "Skip the final table (raw pixels, untrained, trained)."),
        Flag(
            "table_images",
            ("int",),
            10_000,
            "At most so many images of a split in the final table; a fixed draw.",
            limits="[1, inf)",
        ),
        Flag("replay", ("str",), None, "Repeat the step that ended a run by NaN: the nonfinite folder that it left."),
        Flag("debug_traceback", ("bool",), False, "Show the traceback of an error (or set HF_SSL_DEBUG=1)."),
    )
}
# What the command sets where neither the paper, the recipe nor a flag says anything: short runs show a log as well.
DEFAULTS = {"logging_steps": 50, "save_total_limit": 2}


@dataclass
class Plan:
    """A checked command. `values`: recipe and flags merged, without the method's defaults; `own`: of the command."""

    method: str
    values: dict[str, Any]
    own: dict[str, Any]
    recipe: Path | None
    recipe_note: str
    argv: list[str] = field(default_factory=list)

    def group(self, name: str) -> dict[str, Any]:
        """The values of one group of flags: data, model, method, views or training."""
        flags = train_flags(self.method)
        return {key: value for key, value in self.values.items() if flags[key].group == name}

    @property
    def reads(self) -> str:
        """The kind of data that the method reads; also the group of that kind's flags."""
        return stated(self.method, "reads")

    def training(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """Training arguments: the method's `defaults`, then the recipe, then the flags."""
        return merge({**DEFAULTS, **defaults}, self.group("training"))

    @property
    def dataset(self) -> str:
        return self.values.get("dataset", train_flags(self.method)["dataset"].default)

    @property
    def output_dir(self) -> Path:
        name = re.sub(r"[^A-Za-z0-9-]+", "_", f"{self.method}_{Path(self.dataset).name}").strip("_")
        return Path(self.values.get("output_dir") or f"hf-ssl-{name}").expanduser()


def plan_training(argv: Sequence[str], command: str = "train") -> Plan:
    """Read ``METHOD [recipe.yaml] --flags``. Raises UsageError; imports nothing heavy."""
    method = check_method(first_word(argv), command)
    flags = {**train_flags(method), **OWN}
    foreign = other_methods_flags(method)
    parsed = parse(argv, flags, f"{command} {method}", foreign)
    if len(parsed.words) > 2:
        raise UsageError(f"{command} {method}: {parsed.words[2]!r} is one word too many; values follow a --flag.")
    given = {name: value for name, value in parsed.values.items() if name not in OWN}
    own = {name: parsed.values.get(name, flag.default) for name, flag in OWN.items()}
    dataset = given.get("dataset")
    default = default_recipe(method, dataset) if dataset else None
    path = Path(parsed.words[1]) if len(parsed.words) > 1 else default
    recipe = read_recipe(path, train_flags(method), method, foreign) if path else {}
    if path is None:
        note = f"no recipe for {dataset}: the defaults of {method}'s paper"
    else:
        note = f"{path}" + ("" if len(parsed.words) > 1 else f" (the default for {dataset})")
    values = merge(_consistent(recipe, f"recipe {path}"), _consistent(given, f"{command} {method}"))
    plan = Plan(method, values, own, path, note, [command, *argv])
    _check_trackers(plan)
    _check_views(plan)
    return plan


def check_dataset(plan: Plan) -> None:
    """Refuse a run that names no images: the built-in drawings are taken where they are asked for, and only there."""
    if not plan.dataset:
        raise UsageError(
            f"train {plan.method}: --dataset is missing, for example --dataset my_photos/, or --dataset emoji for the "
            "built-in drawings."
        )


def first_word(argv: Sequence[str]) -> str | None:
    """The first word if no flag comes before it: METHOD stands first, so that its flags are known."""
    return argv[0] if argv and not argv[0].startswith("-") else None


def check_method(name: str | None, command: str = "train") -> str:
    if name is None:
        raise UsageError(f"{command}: name the method first, one of {', '.join(METHODS)}.")
    if name not in METHODS:
        near = nearest(name.lower(), METHODS)
        hint = f"the nearest is {near}" if near else f"there are {', '.join(METHODS)}"
        raise UsageError(f"{command}: there is no method {name!r}; {hint}.")
    return name


def other_methods_flags(method: str) -> dict[str, str]:
    """Flags that only other methods have -> "dino and mae, not of simclr", for the complaint about one."""
    mine = train_flags(method)
    owners: dict[str, list[str]] = {}
    for other in METHODS:
        for name in (*config_flags(other), *kind_flags(other)):
            if name not in mine:
                owners.setdefault(name, []).append(other)
    return {name: f"{_listed(others)}, not of {method}" for name, others in owners.items()}


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _consistent(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Refuse two values for one thing within a level, and let bf16 / fp16 speak through `precision`."""
    for first, second in RIVALS:
        if first in values and second in values and values.get("max_steps") != -1:
            raise UsageError(f"{where}: give {first} or {second}, not both.")
    if values.get("bf16") and values.get("fp16"):
        raise UsageError(f"{where}: give bf16 or fp16, not both.")
    half = next((name for name in ("bf16", "fp16") if values.get(name)), None)
    if half or values.get("bf16") is False or values.get("fp16") is False:
        meant = half or "fp32"
        stated = values.get("precision", meant)
        if stated != meant and not (stated == "auto" or half is None):
            raise UsageError(f"{where}: {half} contradicts precision {stated}; give one of them.")
        values = {**values, "precision": meant if half or "precision" not in values else stated}
    return values


_KNOWN_TRACKERS = (
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dvclive", "flyte", "mlflow", "neptune", "swanlab", "tensorboard",
    "trackio", "wandb",
)  # fmt: skip
# Packages of the trackers that report_to names, where they are called otherwise; any one of them will do.
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "flyte": ("flytekit",)}


def _check_trackers(plan: Plan) -> None:
    """Refuse a tracker whose package is not installed; transformers refuses names that it does not know."""
    for name in plan.values.get("report_to") or ():
        packages = _TRACKERS.get(name, (name,))
        if name in _KNOWN_TRACKERS and not any(importlib.util.find_spec(package) for package in packages):
            raise UsageError(
                f"train {plan.method}: --report_to {name} needs a package that is not installed: "
                f"pip install {packages[0]}."
            )


def _check_views(plan: Plan) -> None:
    """Ranges of view fields, by the code that uses them; it needs numpy and cv2, so only where one is given."""
    views = plan.group("views")
    groups = [value for value in views.values() if isinstance(value, dict)]
    groups += [group for group in views.get("views") or []]
    names = {flag.name for flag in train_flags(plan.method)["views"].keys}
    plain = {name: value for name, value in views.items() if name in names and not isinstance(value, dict)}
    if not groups and not plain:
        return
    from ..processing.views import ViewGroup

    for group in [*groups, plain]:
        try:
            ViewGroup.from_dict(group, (224, 224), "views")
        except ValueError as error:
            raise UsageError(f"train {plan.method}: {error}".rstrip(".") + ".") from None
