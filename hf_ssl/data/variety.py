"""Whether there is anything to learn: a run is warned before it trains on pictures that are all alike or blank."""

from __future__ import annotations

import numpy as np

from hf_ssl.data.decode import BadImageError
from hf_ssl.data.sources import ImageSource


def nothing_to_learn(source: ImageSource, sample: int = 32) -> str | None:
    """A sentence where all pictures of a sample spread over `source` are the same, or each is of one colour.

    As a rule two pictures are decoded: looking ends as soon as both are excluded. None for streams, which would have
    to be opened twice.
    """
    if source.is_stream or not source.num_rows:
        return None
    first, alike, blank, seen = None, True, True, 0
    for index in np.unique(np.linspace(0, source.num_rows - 1, sample).astype(int)).tolist():
        try:
            picture = source.decode({**source.dataset[index], "_index": index})
        except BadImageError:
            continue
        seen += 1
        first = picture if first is None else first
        alike = alike and np.array_equal(picture, first)
        blank = blank and bool((picture == picture[:1, :1]).all())
        if not (blank or (alike and seen > 1) or seen == 1):
            return None
    if seen < 2:
        return None
    where = f"{source.name} (split {source.split})"
    if alike:
        return f"All {seen} pictures looked at in {where} are the same: there is nothing to tell apart, or to learn."
    return f"Each of the {seen} pictures looked at in {where} is of one colour: colour is all there is to learn."
