"""Recipes: flat YAML files of flags. Finding the default one, and reading any with the checks a command line gets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..documents import DocumentError, read_document
from ..spelling import nearest
from .console import UsageError
from .fields import Flag
from .flags import BadValue, complaint, convert

_PACKAGE = Path(__file__).resolve().parent.parent


def folders() -> list[Path]:
    """Where packaged recipes lie: inside the installed package, or beside it in a checkout."""
    return [folder for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if folder.is_dir()]


def default_recipe(method: str, dataset: str) -> Path | None:
    """The packaged recipe of a method and a named dataset, e.g. simclr_emoji.yaml.

    A variant such as ``emoji:placed`` takes a recipe of its own if there is one, else that of ``emoji``: the drawings
    are the same. Files and folders of the user have none.
    """
    if os.path.exists(os.path.expanduser(dataset)):
        return None
    for name in (dataset, dataset.partition(":")[0]):
        for folder in folders():
            path = folder / f"{method}_{re.sub(r'[^A-Za-z0-9-]+', '_', name)}.yaml"
            if path.is_file():
                return path
    return None


def read_recipe(
    path: str | Path, flags: Mapping[str, Flag], method: str, foreign: Mapping[str, str]
) -> dict[str, Any]:
    """The values of a recipe, checked. Raises UsageError naming the file and the key."""
    path = Path(path).expanduser()
    if not path.exists():
        known = [str(found) for folder in folders() for found in sorted(folder.glob(f"{method}_*.yaml"))]
        near = nearest(path.name, [Path(name).name for name in known])
        hint = next((f"; the nearest is {name}" for name in known if Path(name).name == near), "")
        raise UsageError(f"train: there is no recipe file {path}{hint}.")
    values: dict[str, Any] = {}
    for key, value in _load(path).items():
        name = key.replace("-", "_")
        if name not in flags:
            if name in foreign:
                raise UsageError(f"recipe {path}: {key!r} is a flag of {foreign[name]}.")
            near = nearest(name, flags)
            hint = f"; the nearest is {near}" if near else ""
            raise UsageError(f"recipe {path}: there is no flag {key[:80]!r}{hint}.")
        try:
            values[name] = convert(flags[name], value)
        except BadValue as error:
            raise UsageError(f"recipe {path}: {key} {complaint(flags[name], value, error)}.") from None
    return values


def _load(path: Path) -> dict[str, Any]:
    try:
        content = read_document(path)
    except DocumentError as error:
        raise UsageError(f"recipe {path}: {error}.") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UsageError(f"recipe {path}: it must be a mapping of flag: value, not a {type(content).__name__}.")
    return content
