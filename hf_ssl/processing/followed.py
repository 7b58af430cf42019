"""Views that repeat the crops of others: `crops_of` of a `ViewGroup`."""

from collections import Counter
from collections.abc import Iterable

from .views import Draw, ViewGroup


def checked(groups: Iterable[ViewGroup]) -> list[ViewGroup]:
    """The groups; ValueError where one has not one view before it to follow for each of its own."""
    groups, views = list(groups), Counter[str]()
    for group in groups:
        if group.crops_of and views[group.crops_of] != group.count:
            drawn = f"{group.crops_of}, of which {views[group.crops_of]} are drawn before it and not {group.count}"
            raise ValueError(
                f"views: {group.key} repeats the crops of {drawn}: count must be their number or 0, and they must be "
                "drawn as well."
            )
        views[group.key] += group.count
    return groups


def follow(draw: Draw, drawn_for: ViewGroup, group: ViewGroup) -> Draw:
    """The same crop, flips, rotation and shift at the size of `group`, and nothing else; takes no random number."""
    down, right = (
        round(pixels * new / old) for pixels, new, old in zip(draw.shift, group.size, drawn_for.size, strict=True)
    )
    return Draw(draw.box, draw.hflip, draw.vflip, draw.rotation, (down, right))
