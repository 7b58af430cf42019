"""``hf-ssl convert``: an official checkpoint becomes a folder that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..hub.official import OFFICIAL
from .commands import loading_lines
from .console import UsageError, quiet, say
from .fields import Flag
from .flags import Parsed

FLAGS = (
    Flag("output", ("str",), None, "Folder to write; the native model in its root, the whole method in ssl/."),
    Flag(
        "method", ("str",), None, f"Of {', '.join(OFFICIAL)}; told by its names if not given.", "", True,
        tuple(OFFICIAL),
    ),
    Flag(
        "which", ("str",), None, "Of two copies; the one the paper evaluates if not given.", "", True,
        ("teacher", "student"),
    ),
    Flag(
        "num_heads", ("int",), None, "Attention heads, told by no tensor; default: the published number.", "", True,
        limits="[1, inf)",
    ),
    Flag("decoder_num_heads", ("int",), None, "Of MAE's decoder; default: 32 wide each.", "", True, limits="[1, inf)"),
    Flag(
        "layer_norm_eps", ("float",), None, "LayerNorm's eps, told by no tensor; default: 1e-6, as published.", "",
        True, limits="(0, 1)",
    ),
    Flag(
        "hidden_act", ("str",), None, "Activation, told by no tensor, by transformers' name; default: gelu.", "", True,
    ),
    Flag("image_size", ("list",), None, "Pixels, or HEIGHT,WIDTH, if positions do not tell; default: 224.", "", True),
    Flag("image_mean", ("list",), None, "Of the pictures it was trained on; default: ImageNet's.", "", True),
    Flag("image_std", ("list",), None, "The same for the deviation.", "", True),
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
    for name in ("image_size", "image_mean", "image_std"):
        if values.get(name) is not None:
            values[name] = _numbers(name, values[name])
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


def _numbers(name: str, given: Any) -> tuple[Any, ...]:
    kind, wanted = (int, "pixels or HEIGHT,WIDTH") if name == "image_size" else (float, "numbers, one per channel")
    try:
        found = tuple(kind(item) for item in (given if isinstance(given, list) else [given]))
    except (TypeError, ValueError):
        found = ()
    if not found or (name == "image_size" and (len(found) > 2 or min(found) < 1)):
        raise UsageError(f"convert: --{name} must be {wanted}, not {given!r}.")
    return found * 2 if name == "image_size" and len(found) == 1 else found
