"""Texts that stand for classes in zero-shot classification: templates, descriptions, and files of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_ssl.documents import DocumentError, read_document

DEFAULT_TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}")
# the seven of 80 that OpenAI's notebook found best for CLIP (arXiv 2103.00020)
SIMPLE_TEMPLATES = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.",
)  # fmt: skip

# The nine groups of Unicode's emoji, each told by plain words for what is in it, as captions of emoji are written.
EMOJI_GROUPS: dict[str, tuple[str, ...]] = {
    "smileys-emotion": (
        "smiling face", "grinning face, happy, smile", "sad face, disappointed", "angry face, mad",
        "face, eyes, mouth", "tired face, sleep", "kiss, love", "cat, face, smile", "heart, love", "red heart",
        "emotion", "face, tongue",
    ),
    "people-body": (
        "person", "man", "woman", "boy, child", "girl, child", "family, child", "couple, love", "hand",
        "hand, gesture", "finger, hand", "man, worker", "woman, worker", "person, sport", "person walking", "adult",
        "body, hand", "person, fantasy, fairy tale",
    ),
    "flags": ("flag", "flag: country", "flag of a country", "country, flag"),
    "symbols": (
        "symbol", "button", "sign", "arrow", "right arrow", "zodiac", "horoscope, zodiac", "no, prohibited, forbidden",
        "circle", "square", "keycap", "religion, symbol", "japanese button", "ideograph, japanese", "mark",
        "star, symbol",
    ),
    "travel-places": (
        "building", "house, building", "city, building", "mountain", "car, vehicle", "vehicle, travel",
        "train, vehicle", "airplane, travel", "boat, travel", "clock, time", "o’clock, clock, time", "weather, cloud",
        "cloud, rain", "sun, weather", "moon, space", "star, space", "beach, travel", "place",
    ),
    "objects": (
        "clothing", "clothes, shoe", "tool", "book, education", "computer", "telephone, communication", "camera",
        "music", "instrument, music", "money, bank", "letter, mail", "paper, office", "box", "lock", "key", "light",
        "medicine, doctor", "bag, shopping", "hat, clothing",
    ),
    "animals-nature": (
        "animal", "animal, face", "dog, animal, pet", "cat, animal, pet", "bird, animal", "fish, animal, ocean",
        "insect, animal", "animal, zoo", "plant", "flower, plant", "tree, plant", "leaf, plant", "nature",
    ),
    "food-drink": (
        "food", "fruit, food", "vegetable, food", "bread, food", "meat, food", "restaurant, food",
        "dessert, sweet, food", "cake, dessert, sweet", "drink", "drink, bar", "glass, drink", "cup, drink",
    ),
    "activities": (
        "sport", "ball, sport", "ball, game", "game", "card, game", "celebration, party", "celebration",
        "medal, award", "toy", "gift, celebration", "art", "ticket",
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
    if str(path) == "simple":
        return Prompts(SIMPLE_TEMPLATES)
    try:
        found = read_document(path)
    except DocumentError as error:
        raise ValueError(f"The prompts file {path} cannot be read: {error}.") from None
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
