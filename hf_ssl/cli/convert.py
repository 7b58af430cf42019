"""``hf-ssl convert``: an official checkpoint becomes a folder that plain transformers loads."""

from __future__ import annotations

from pathlib import Path

from ..hub.official import OFFICIAL
from .commands import loading_lines
from .console import UsageError, quiet, say
from .fields import Flag
from .flags import Parsed

FLAGS = (
    Flag("output", ("str",), None, "Folder to write; the native model in its root, the whole method in ssl/."),
    Flag(
        "method", ("str",), None, f"Kind of file: {', '.join(OFFICIAL)}; default: by its tensors' names.", "", True,
        tuple(OFFICIAL),
    ),
    Flag(
        "which", ("str",), None, "Which of two copies; default: the one that the paper evaluates.", "", True,
        ("teacher", "student"),
    ),
    Flag(
        "num_heads", ("int",), None, "Attention heads, which no tensor shows; default: as published.", "", True,
        limits="[1, inf)",
    ),
    Flag(
        "decoder_num_heads", ("int",), None, "Attention heads of MAE's decoder; default: 32 wide each.", "", True,
        limits="[1, inf)",
    ),
    Flag(
        "layer_norm_eps", ("float",), None, "LayerNorm's eps, which no tensor shows; default: 1e-6, as published.", "",
        True, limits="(0, 1)",
    ),
    Flag(
        "hidden_act", ("str",), None, "Activation by name, which no tensor shows; default: gelu.", "", True,
    ),
    Flag("image_size", ("list",), None, "Pixels, or HEIGHT,WIDTH, if positions do not tell; default: 224.", "", True),
    Flag("image_mean", ("numbers",), None, "Mean of the pictures it was trained on; default: ImageNet's.", "", True),
    Flag("image_std", ("numbers",), None, "Standard deviation of those pictures; default: ImageNet's.", "", True),
    Flag("overwrite", ("bool",), False, "Replace an earlier conversion."),
)  # fmt: skip


def convert(parsed: Parsed) -> int:
    """Reads tensors alone, converts, compares with a fresh load and says what was left out."""
    if len(parsed.words) != 1:
        raise UsageError(f"convert: give one FILE, not {' '.join(parsed.words) or 'nothing'}.")
    values = dict(parsed.values)
    if values.get("output") is None:
        raise UsageError("convert: --output is missing, for example --output my-model.")
    output = Path(values.pop("output")).expanduser()
    if values.get("image_size") is not None:
        values["image_size"] = _size(values["image_size"])
    for name in ("image_mean", "image_std"):
        if isinstance(values.get(name), (int, float)):
            values[name] = [values[name]]
    quiet()
    from ..hub.convert import convert_checkpoint, grouped

    done = convert_checkpoint(Path(parsed.words[0]).expanduser(), output, **values)
    whole = "; the whole method in ssl/" if done.whole else ""
    say(
        f"converted  {len(done.names)} tensors: {OFFICIAL[done.method].name}, {done.about}"
        + (f", from {done.root[:-1]}" if done.root else ""),
        *(f"note       {note}" for note in done.notes),
        *(f"left out   {line}" for line in grouped(done.left_out)),
        f"checked    a fresh load gives the same features (largest difference {done.difference:.1g} of their size)",
        f"model      {output}{whole}",
        *loading_lines(output),
    )
    return 0


def _size(given: list) -> tuple[int, int]:
    try:
        found = [int(item) for item in given]
    except (TypeError, ValueError):
        found = []
    if len(found) not in (1, 2) or min(found) < 1:
        raise UsageError(f"convert: --image_size must be pixels or HEIGHT,WIDTH, not {','.join(map(str, given))!r}.")
    return found[0], found[-1]
