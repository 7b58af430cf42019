"""Pictures for a card: nearest neighbours before and after training, what a masked model fills in."""

import logging
from pathlib import Path
from typing import Any

from ..data.sources import BUILT_IN
from ..evaluation.album import Missing, Run, load_album
from ..evaluation.pictures import before_after_figure, random_queries, reconstruction_pictures
from ..files import whole_file
from ..untouched import untouched
from .folder import PICTURES

logger = logging.getLogger("hf_ssl.hub")

_TILE = 96


def may_show(run: dict[str, Any]) -> bool:
    """Whether the pictures a run was trained on are public beyond doubt: the built-in ones are."""
    return run.get("dataset") in BUILT_IN


@untouched()
def draw_pictures(path: str | Path, dataset: str | None = None, max_images: int = 600) -> list[Path]:
    """Write PNGs of a run's test pictures (or ``dataset``'s) into its folder's pictures/; failures are logged."""
    folder = Path(path, PICTURES)
    written = []
    try:
        run = Run.open(path)
        album = load_album(run, dataset, max_images, progress=False)
        folder.mkdir(exist_ok=True)
        written.append(folder / "neighbours.png")
        _save(before_after_figure(album), written[-1])
        rows = reconstruction_pictures(run, album, random_queries(album.values(), 6))
        written.append(folder / "filled_in.png")
        _save(_sheet(rows), written[-1])
    except Missing as reason:
        logger.debug("%s", reason)
    except Exception as error:  # a card without a picture is better than no card
        logger.warning("The card has no further pictures: %s", error)
    return [file for file in written if file.is_file()]


def _save(picture: Any, path: Path) -> None:
    with whole_file(path) as file:
        picture.save(file)


def _sheet(rows: Any) -> Any:
    """Arrays (B, H, W, 3) as rows of one PIL picture."""
    import numpy as np
    from PIL import Image

    sheet = Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows], 0))
    scale = max(1, round(_TILE * len(rows[0]) / sheet.width))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
