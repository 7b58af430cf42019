"""Texts that stand for classes in zero-shot classification: templates, descriptions, and files of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}")
# the seven of 80 that OpenAI's notebook found best for CLIP (arXiv 2103.00020)
SIMPLE_TEMPLATES = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.",
)  # fmt: skip

# The nine groups of Unicode's emoji, each told by plain words for what is in it.
EMOJI_GROUPS: dict[str, tuple[str, ...]] = {
    "smileys-emotion": (
        "grinning face", "smiling face", "face with open mouth", "sad face", "angry face", "crying face", "tired face",
        "kissing face", "cat with a smiling face", "red heart", "love", "emotion",
    ),
    "people-body": (
        "person", "man", "woman", "girl", "boy", "family", "raised hand", "hand with a finger", "body part",
        "man at work", "woman at work", "person doing sport", "person walking", "couple",
    ),
    "flags": ("flag", "flag of a country", "national flag", "flag: country"),
    "symbols": (
        "symbol", "sign", "button", "arrow", "zodiac sign", "warning sign", "no entry, prohibited", "circle", "square",
        "number", "letters", "mathematical sign", "religious symbol",
    ),
    "travel-places": (
        "place", "building", "house", "city", "mountain", "map", "car", "vehicle", "train", "airplane", "ship",
        "clock, time", "weather", "cloud with rain", "sun", "moon", "star in the sky",
    ),
    "objects": (
        "object", "clothing", "shoe", "book", "computer", "telephone", "camera", "music", "musical instrument",
        "money", "letter, mail", "office paper", "tool", "lock and key", "light", "medicine", "household furniture",
    ),
    "animals-nature": (
        "animal", "dog", "cat", "mammal", "bird", "fish", "reptile", "insect", "plant", "flower", "tree", "leaf",
    ),
    "food-drink": (
        "food", "drink", "fruit", "vegetable", "bread", "meat", "meal in a bowl", "cake", "sweet dessert",
        "glass of wine", "cup with a hot drink",
    ),
    "activities": (
        "activity", "game", "sport", "ball", "medal for the winner", "toy", "celebration, party", "gift", "art",
        "playing card",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Prompts:
    """`templates`, each with one {}; `classes`: class name -> descriptions to fill in (empty: just the names)."""

    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for template in self.templates:
            if not isinstance(template, str) or template.count("{}") != 1:
                raise ValueError(
                    f"A template holds {{}} once, where the class goes, such as 'a {{}}'; got {template!r}."
                )
        if not self.templates:
            raise ValueError("Prompts need at least one template, such as 'a photo of a {}'.")

    def texts(self, name: str) -> list[str]:
        """Every prompt of the class `name`; a name without descriptions is read with its underscores as spaces."""
        described = self.classes.get(name) or (name.replace("_", " "),)
        return [template.replace("{}", words) for words in described for template in self.templates]


def resolve(prompts: Prompts | None, names: Sequence[str]) -> Prompts:
    """The prompts for classes `names`: those given, else the packaged ones for emoji groups, else DEFAULT_TEMPLATES.

    Raises ValueError where the given ones describe other classes than `names`.
    """
    if prompts is None:
        return Prompts(("{}",), EMOJI_GROUPS) if set(names) == set(EMOJI_GROUPS) else Prompts()
    if prompts.classes and set(prompts.classes) != set(names):
        extra, lacking = sorted(set(prompts.classes) - set(names)), sorted(set(names) - set(prompts.classes))
        words = [f"describe {extra[0]!r}, which is no class of the data"] if extra else []
        words += [f"lack {lacking[0]!r}"] if lacking else []
        raise ValueError(f"The prompts {' and '.join(words)}; the classes are {', '.join(sorted(names))}.")
    return prompts


def load_prompts(path: str | Path) -> Prompts:
    """Prompts of a YAML or JSON file {"templates": [...], "classes": {"name": ["description", ...]}}, or "simple".

    Either key may be absent: templates default to "{}" where classes are described, else to DEFAULT_TEMPLATES.
    "simple" means the seven SIMPLE_TEMPLATES. Raises ValueError naming the file and the entry that is wrong.
    """
    import yaml

    if str(path) == "simple":
        return Prompts(SIMPLE_TEMPLATES)
    try:
        found = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))  # JSON is YAML too
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The prompts file {path} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"The prompts file {path} is neither YAML nor JSON{where}.") from None
    if not isinstance(found, dict) or not found or set(found) - {"templates", "classes"}:
        held = ", ".join(map(str, found)) if isinstance(found, dict) and found else type(found).__name__
        raise ValueError(f"The prompts file {path} must hold the keys templates and/or classes; it holds {held}.")
    classes = found.get("classes") or {}
    if not isinstance(classes, dict):
        raise ValueError(f"{path}: classes must map each class name to a list of descriptions, not a list of names.")
    described = {str(name): _strings(path, f"classes[{name!r}]", value) for name, value in classes.items()}
    default = ("{}",) if described else DEFAULT_TEMPLATES
    templates = _strings(path, "templates", found["templates"]) if "templates" in found else default
    try:
        return Prompts(templates, described)
    except ValueError as error:
        raise ValueError(f"The prompts file {path}: {error}") from None


def _strings(path: str | Path, entry: str, value: Any) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError(f"{path}: {entry} must be a list of texts, not {value!r}.")
    return tuple(value)
