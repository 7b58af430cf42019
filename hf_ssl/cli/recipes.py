"""Recipes: flat YAML files of flags. Finding the default one, and reading any with the checks a command line gets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .console import UsageError, nearest
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
    if not path.is_file():
        known = [str(found) for folder in folders() for found in sorted(folder.glob(f"{method}_*.yaml"))]
        near = nearest(path.name, [Path(name).name for name in known])
        hint = next((f"; the nearest is {name}" for name in known if Path(name).name == near), "")
        raise UsageError(f"train: there is no recipe file {path}{hint}.")
    values: dict[str, Any] = {}
    for key, value in _load(path).items():
        name = str(key).replace("-", "_")
        if name not in flags:
            if name in foreign:
                raise UsageError(f"recipe {path}: {key!r} is a flag of {foreign[name]}.")
            near = nearest(name, flags)
            raise UsageError(f"recipe {path}: there is no flag {key!r}{f'; the nearest is {near}' if near else ''}.")
        try:
            values[name] = convert(flags[name], value)
        except BadValue as error:
            raise UsageError(f"recipe {path}: {key} {complaint(flags[name], value, error)}.") from None
    return values


def _load(path: Path) -> dict[Any, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice: the first would be lost without a word."""

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UsageError(f"recipe {path}: {key!r} stands twice (line {node.start_mark.line + 1} on).")
        return dict(zip(keys, [loader.construct_object(value, deep=True) for _, value in node.value], strict=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"recipe {path}: it is no YAML{line}: {getattr(error, 'problem', None) or error}.") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UsageError(f"recipe {path}: it must be a mapping of flag: value, not a {type(content).__name__}.")
    return content
