"""The flags a command takes, read from the dataclasses' source with ``ast``: exact, and nothing heavy is imported.

`train_flags` gives every field of DataArguments, ModelArguments, SSLTrainingArguments (with what it inherits from
transformers), the method's config, the views and the view groups. Nothing is listed twice, so nothing can go stale.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..methods import METHODS
from .vocabulary import FIELDS, VIEWS, explain

_PACKAGE = Path(__file__).resolve().parent.parent
UNKNOWN = object()  # a default that only running the code would tell
_BUILT_IN = ("bool", "int", "float", "str", "list", "dict")
# The order in which a value's reading is tried.
_ORDER = ("bool", "int", "float", "pair", "numbers", "list", "dict", "json", "str")


@dataclass(frozen=True)
class Flag:
    """One ``--name``. `kinds`: what a value may be, of `_ORDER`; `keys`: the fields a dict value may hold.

    `limits`: of a number, as in ``hf_ssl.limits``.
    """

    name: str
    kinds: tuple[str, ...]
    default: Any = None
    help: str = ""
    group: str = "command"
    optional: bool = False
    choices: tuple[str, ...] = ()
    keys: tuple[Flag, ...] = ()
    limits: str | None = None


class Source:
    """A parsed Python file that finds classes and aliases, through relative imports as well."""

    def __init__(self, path: Path):
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"))

    def find(self, name: str) -> tuple[Source, ast.AST] | None:
        """(file, node) of the class or the value assigned to `name`; None if it comes from elsewhere."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return self, node
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return self, node.value
            if isinstance(node, ast.ImportFrom) and node.level and any(a.name == name for a in node.names):
                folder = self.path.parents[node.level - 1]
                target = folder.joinpath(*(node.module or "").split("."))
                for path in (target.with_suffix(".py"), target / "__init__.py"):
                    if path.is_file():
                        return source(path).find(name)
        return None


@functools.cache
def source(path: Path) -> Source:
    return Source(path)


def _transformers(name: str) -> Source | None:
    """The file of transformers that holds the class `name`; the package itself is not imported."""
    homes = {"TrainingArguments": "training_args.py"}
    spec = importlib.util.find_spec("transformers")
    if name not in homes or spec is None or not spec.submodule_search_locations:
        return None
    return source(Path(spec.submodule_search_locations[0], homes[name]))


def class_flags(file: Source, name: str, group: str) -> dict[str, Flag]:
    """The annotated fields of class `name`, bases first, as far as their source is ours or TrainingArguments."""
    found = file.find(name)
    if found is None and (other := _transformers(name)):
        found = other.find(name)
    node = found[1] if found else None
    if found is None or not isinstance(node, ast.ClassDef):
        return {}
    file = found[0]
    flags: dict[str, Flag] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            flags |= class_flags(file, base.id, group)
    documented = _documented(ast.get_docstring(node) or "")
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            flag = _flag(file, item, group, documented)
            if flag is not None:
                inherited = flags.get(flag.name)  # a new default for an enum of transformers keeps its choices
                choices = flag.choices or (inherited.choices if inherited else ())
                flags[flag.name] = replace(flag, choices=choices)
    for field, choices in _checked_choices(node).items():
        if field in flags:
            flags[field] = replace(flags[field], choices=choices)
    limits = _limits(file, node)
    return {field: replace(flag, limits=limits.get(field)) for field, flag in flags.items()}


def _limits(file: Source, node: ast.ClassDef) -> dict[str, str]:
    """What the class and its bases state as ``limits``."""
    found: dict[str, str] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and (above := file.find(base.id)) and isinstance(above[1], ast.ClassDef):
            found |= _limits(above[0], above[1])
    return found | _literal(_class_value(node, "limits"), {})


def _flag(file: Source, item: ast.AnnAssign, group: str, documented: dict[str, str]) -> Flag | None:
    name = getattr(item.target, "id", "_")
    if name.startswith("_"):
        return None
    kinds, choices, optional = _annotation(file, item.annotation)
    default, text = UNKNOWN, documented.get(name, "")
    value = item.value
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field":
        keywords = {k.arg: k.value for k in value.keywords}
        value = keywords.get("default")
        for key, entry in _pairs(keywords.get("metadata")):
            if key == "help":
                text = _literal(entry, text)
            elif key == "choices":
                choices = tuple(_literal(entry, choices))
    if value is not None:
        default = _literal(value, UNKNOWN)
    if not kinds:
        return None  # a ClassVar, or an object that no text can stand for
    if not choices and kinds == ("str",) and (options := re.search(r"Options: ((?:'\w+',? ?)+)", text)):
        choices = tuple(re.findall(r"'(\w+)'", options[1]))
    text = " ".join(text.split())
    if group not in ("method", "views") and text:
        text = text.rstrip(".") + "."  # transformers leaves it out here and there
    return Flag(name, kinds, default, text, group, optional or default is None, choices)


def _annotation(file: Source, node: ast.expr) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """(kinds, choices, may be None) of an annotation; classes of string constants (enums) give choices."""
    kinds: set[str] = set()
    choices: list[str] = []
    optional = False
    todo: list[tuple[Source, ast.AST]] = [(file, node)]
    while todo:
        file, part = todo.pop()
        if isinstance(part, ast.BinOp):
            todo += [(file, part.right), (file, part.left)]
        elif isinstance(part, ast.Constant) and part.value is None:
            optional = True
        elif isinstance(part, ast.Subscript):
            outer = getattr(part.value, "id", "")
            if outer == "tuple":
                kinds.add("pair")
            elif outer == "list" and getattr(part.slice, "id", "") == "float":
                kinds.add("numbers")
            elif outer in ("list", "dict"):
                kinds.add(outer)
            elif outer == "Literal":
                values = _literal(part.slice, ())
                choices += [v for v in (values if isinstance(values, tuple) else (values,)) if isinstance(v, str)]
        elif isinstance(part, ast.Name) and part.id in _BUILT_IN:
            kinds.add(part.id)
        elif isinstance(part, ast.Name) and part.id == "Any":
            kinds.add("json")
        elif isinstance(part, ast.Name) and (found := file.find(part.id)):
            if isinstance(found[1], ast.ClassDef):
                choices += _constants(found[1])
            else:
                todo.append(found)
    if choices:
        kinds.add("str")
    return tuple(k for k in _ORDER if k in kinds), tuple(choices), optional


def _constants(node: ast.ClassDef) -> list[str]:
    values = [item.value for item in node.body if isinstance(item, ast.Assign)]
    return [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]


def _checked_choices(node: ast.ClassDef) -> dict[str, tuple[str, ...]]:
    """Fields that ``__post_init__`` holds against a tuple of names: ``if self.x not in ("a", "b")``."""
    checked: dict[str, tuple[str, ...]] = {}
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__post_init__":
            for part in ast.walk(method):
                if isinstance(part, ast.Compare) and isinstance(part.ops[0], ast.NotIn):
                    values = _literal(part.comparators[0], ())
                    if isinstance(part.left, ast.Attribute) and values and all(isinstance(v, str) for v in values):
                        checked[part.left.attr] = tuple(values)
    return checked


def _documented(docstring: str) -> dict[str, str]:
    """A docstring's ``name: text`` and ``name, name: text`` passages, by name."""
    text = " ".join(docstring.split())
    starts = list(re.finditer(r"(?:(?<=^)|(?<=[.;)-] ))((?:\w+, )*\w+): ", text))
    found = {}
    ends = [start.start() for start in starts[1:]] + [len(text)]
    for start, end in zip(starts, ends, strict=False):
        passage = text[start.end() : end].partition(" - ")[0].strip(" -")
        for name in start[1].split(", "):
            found[name] = passage
    return found


def _literal(node: ast.AST | None, otherwise: Any) -> Any:
    try:
        return ast.literal_eval(node)  # type: ignore[arg-type]
    except (ValueError, TypeError, SyntaxError):
        return otherwise


def _pairs(node: ast.AST | None) -> list[tuple[Any, ast.AST]]:
    if not isinstance(node, ast.Dict):
        return []
    return [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]


# --- what a method states -------------------------------------------------------------------------------------------


def _method_file(method: str) -> tuple[Source, str]:
    module, stem = METHODS[method]
    return source(_PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")), stem


def _class_value(node: ast.ClassDef, name: str) -> ast.expr | None:
    for item in node.body:
        targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return item.value  # type: ignore[union-attr]
    return None


def stated(method: str, name: str) -> Any:
    """A literal class attribute of a method's model, or of a class that it extends: ``reads``, ``publishes``, ..."""
    file, stem = _method_file(method)
    todo = [(file, _class(file, f"{stem}ForPreTraining"))]
    while todo:
        file, node = todo.pop(0)
        if (value := _class_value(node, name)) is not None:
            return _literal(value, None)
        bases = [file.find(base.id) for base in node.bases if isinstance(base, ast.Name)]
        todo += [(found[0], found[1]) for found in bases if found and isinstance(found[1], ast.ClassDef)]
    return None


def _class(file: Source, name: str) -> ast.ClassDef:
    found = file.find(name)
    assert found is not None and isinstance(found[1], ast.ClassDef), f"{file.path} has no class {name}"
    return found[1]


def paper(method: str) -> dict[str, str]:
    """The fields of the method's ``Paper``: name, title, arxiv, bibtex, family, teaches."""
    file, stem = _method_file(method)
    call = _class_value(_class(file, f"{stem}ForPreTraining"), "paper")
    assert isinstance(call, ast.Call)
    return {str(k.arg): _literal(k.value, "") for k in call.keywords}


def method_defaults(method: str) -> dict[str, Any]:
    """The method's ``default_arguments`` as far as they are literals, for the help text."""
    return stated(method, "default_arguments")


def method_views(method: str) -> list[dict[str, Any]]:
    """The groups of views of the method's image processor, as far as they are literals; each has its ``key``."""
    from ..processing import presets  # plain dicts: nothing heavy comes with them

    file, stem = _method_file(method)
    listed = _class_value(_class(file, f"{stem}ImageProcessor"), "views")
    if isinstance(listed, ast.Attribute):  # presets.BYOL
        return [dict(group) for group in getattr(presets, listed.attr)]
    groups = []
    for node in listed.elts if isinstance(listed, ast.List) else []:
        group: dict[str, Any] = {"key": "pixel_values"}
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            if key is not None:
                group[_literal(key, "?")] = _literal(value, "...")
            elif isinstance(value, ast.Attribute):  # **presets.JIGSAW
                group |= getattr(presets, value.attr)
            elif isinstance(value, ast.Name) and (found := file.find(value.id)):  # **_COLOUR
                group |= _literal(found[1], {})
        groups.append(group)
    return groups


def kind_flags(method: str) -> dict[str, Flag]:
    """The flags of the kind of data that the method reads: of the one dataclass in its file named ...Arguments."""
    reads = stated(method, "reads")
    file = source(_PACKAGE / "training" / "kinds" / f"{reads}.py")
    classes = [node.name for node in file.tree.body if isinstance(node, ast.ClassDef)]
    own = [name for name in classes if name.endswith("Arguments")]
    return class_flags(file, own[0], reads) if own else {}


def config_flags(method: str) -> dict[str, Flag]:
    """The method's config fields; which backbone is ModelArguments' business."""
    file, stem = _method_file(method)
    flags = class_flags(file, f"{stem}Config", "method")
    flags.pop("backbone_config", None)
    return _explained(flags, FIELDS)


def _explained(flags: dict[str, Flag], words: dict[str, str]) -> dict[str, Flag]:
    """The flags with whole sentences as help, where `words` say what they are."""
    return {name: replace(flag, help=explain(name, flag.help, words)) for name, flag in flags.items()}


def view_flags(method: str | None) -> dict[str, Flag]:
    """View fields, the processor's attributes and (of a method) one dict flag for each group of views."""
    views = class_flags(source(_PACKAGE / "processing" / "views.py"), "ViewGroup", "views")
    views.pop("key", None)  # renames a tensor the method's forward expects
    views = _explained(views, VIEWS)
    processor = class_flags(source(_PACKAGE / "processing" / "image_processor.py"), "SSLImageProcessor", "views")
    processor = _explained(processor, VIEWS)
    group_fields = tuple(views.values())
    processor["views"] = replace(processor["views"], keys=group_fields)
    flags = processor | views
    if method is not None:
        for group in method_views(method):
            text = 'View fields for these views only, as JSON: {"count": 4, "size": 32}.'
            flags[group["key"]] = Flag(group["key"], ("dict",), None, text, "views", True, keys=group_fields)
    return flags


@functools.cache
def train_flags(method: str | None) -> dict[str, Flag]:
    """Every field that ``hf-ssl train METHOD`` takes as a flag, by name; without METHOD, none of the method's own."""
    arguments = source(_PACKAGE / "training" / "arguments.py")
    training = class_flags(arguments, "SSLTrainingArguments", "training")
    for name, known in (("optim", "OPTIMISERS"), ("lr_scheduler_type", "SCHEDULES")):
        found = arguments.find(known)
        added = _literal(found[1], ()) if found else ()
        training[name] = replace(training[name], choices=tuple(dict.fromkeys([*added, *training[name].choices])))
    # a bare --resume_from_checkpoint means the last checkpoint
    training["resume_from_checkpoint"] = replace(training["resume_from_checkpoint"], kinds=("bool", "str"))
    data = class_flags(arguments, "DataArguments", "data")
    model = class_flags(arguments, "ModelArguments", "model")
    own, kind = (config_flags(method), kind_flags(method)) if method else ({}, {})
    flags: dict[str, Flag] = {}
    for group in (data, kind, model, own, training, view_flags(method)):
        for name, flag in group.items():
            flags.setdefault(name, flag)  # num_channels is a field of the model and of the processor
    return flags
