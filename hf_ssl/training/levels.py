"""Settings of several levels, the paper's under a recipe's under the user's. Nothing heavy is imported."""

from typing import Any

# Setting one on a higher level takes back the other from a lower one: both say the same thing.
RIVALS = (("learning_rate", "base_learning_rate"), ("max_steps", "num_train_epochs"))


def merge(lower: dict[str, Any], higher: dict[str, Any]) -> dict[str, Any]:
    """`lower` under `higher`; dicts of view fields merge, rivals of what `higher` sets disappear."""
    merged = dict(lower)
    for pair in RIVALS:
        for name, rival in (pair, pair[::-1]):
            if name in higher and rival not in higher:
                merged.pop(rival, None)
    for name, value in higher.items():
        below = merged.get(name)
        merged[name] = {**below, **value} if isinstance(value, dict) and isinstance(below, dict) else value
    return merged
