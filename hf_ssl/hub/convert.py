"""An official checkpoint as a folder that plain transformers opens: the native model in its root, ``ssl/`` the method.

Nothing of a file goes unsaid: every tensor is converted, named in ``conversion.json`` with where it went, or listed
there and in the report as left out. A folder whose fresh load gives other features is not left behind.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel

from .. import backbones, loading
from ..files import whole_folder
from ..methods import METHODS, load
from ..modeling import Paper, SSLModel
from ..processing import SSLImageProcessor
from . import wholes
from .card import BEGIN, END, citation, merged, picture_code
from .checkpoints import Checkpoint, CheckpointError, read_checkpoint
from .folder import TOLERANCE
from .natives import Native, Sizes, convert, listed, roots
from .official import OFFICIAL, Official

REPORT = "conversion.json"
_WRITTEN = (REPORT, "config.json", "model*.safetensors*", "preprocessor_config.json", "README.md", "ssl")
# What says only how a model was wrapped or saved: first parts of a name, and parts anywhere in it.
_WRAPPERS = {
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "classy_state_dict",
    "base_model",
    "trunk",
    "_feature_blocks",
}
_AVERAGES = {"state_dict_ema", "model_ema"}  # timm's, DeiT's
_ANYWHERE = {"module", "_orig_mod", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class Conversion:
    """What was made of a file. root: the prefix that the backbone had in it. left_out: name -> why."""

    method: str
    root: str
    about: str
    whole: bool
    notes: list[str]
    names: dict[str, list[str]]
    left_out: dict[str, str]
    difference: float


def convert_checkpoint(
    file: str | Path,
    output: str | Path,
    method: str | None = None,
    which: str | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    layer_norm_eps: float | None = None,
    hidden_act: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write ``output`` from a .pth, .pt or .safetensors file of official code, torchvision or timm.

    method: of ``official.OFFICIAL``; told by the tensors' names if None. which: "teacher" or "student" where a file
    holds both. Heads, picture size (height, width), mean and std, LayerNorm's eps and the activation (by transformers'
    name) are what tensors cannot tell: what is assumed where none is given is in the notes, the card and the config.
    Raises CheckpointError (a ValueError) or WriteError (an OSError) with one sentence; nothing is left behind then.
    """
    file, output = Path(file), Path(output)
    _check_output(output, overwrite)
    read = _read(file)
    found = roots(read.tensors)
    method = _method(file, method, read.tensors, found)
    entry = OFFICIAL[method]
    root = _choose(file, entry, which, found)
    sizes = Sizes(num_heads, entry.heads, image_size, layer_norm_eps, hidden_act)
    native = _native(read.tensors, root, found, sizes, method == "backbone")
    model, names, notes = _whole(method, read, root, found, native, sizes, decoder_num_heads)
    processor = _processor(native.model, image_size, image_mean, image_std, model)
    notes = [*native.notes, *_dtype_notes(read.tensors, root, native), *notes]
    if image_size is None and not hasattr(native.model.config, "image_size"):
        notes.append("pictures of 224x224 assumed, which no tensor tells; --image_size says otherwise")
    notes += native.assumed
    notes += _picture_notes(processor, image_mean, image_std)
    notes.append(f"its feature, as evaluated here, is {_FEATURES.get(native.family, 'the class token')}")
    left = _left_out(read, names, root, found)
    with whole_folder(output, stale=("*", "ssl/*")) as folder:
        native.model.save_pretrained(folder)
        processor.native_processor().save_pretrained(folder)
        if model is not None:
            model.save_pretrained(folder / "ssl")
            processor.save_pretrained(folder / "ssl")
        difference = _parity(folder, native.model)
        done = Conversion(method, root, native.about, model is not None, notes, names, left, difference)
        _write_report(folder, file, done)
        _card(entry, method, file, done, native.model, output).save(folder / "README.md")
    return done


# --- what the file holds ------------------------------------------------------------------------------------------


def _read(file: Path) -> Checkpoint:
    """The file, its names without what wrappers added: ``state_dict.module.encoder_q.fc.bias`` is
    ``encoder_q.fc.bias``."""
    read = read_checkpoint(file)
    plain: dict[str, Tensor] = {}
    for name, tensor in read.tensors.items():
        parts = name.split(".")
        while len(parts) > 1 and parts[0] in _WRAPPERS | _ANYWHERE:
            parts = parts[1:]
        if parts[0] in _AVERAGES:
            parts[0] = "ema"
        short = ".".join(part for part in parts if part not in _ANYWHERE)
        if short in plain:
            raise CheckpointError(f"{file} holds {short} twice (once as {name}): save the one you want alone.")
        plain[short] = tensor
    return Checkpoint(plain, read.others, read.args)


def _method(file: Path, method: str | None, tensors: Mapping[str, Tensor], found: Mapping[str, str]) -> str:
    if not found:
        raise CheckpointError(
            f"{file} holds no backbone that convert knows (a ResNet with torchvision's names, a ViT with timm's, "
            f"torchvision's or DINOv2's); its tensors are {listed(list(tensors), 4) or 'none'}."
        )
    likely = [name for name, entry in OFFICIAL.items() if entry.looks_like(tensors)]
    if method is None:
        return likely[0] if len(likely) == 1 else "backbone"
    if method not in OFFICIAL:
        raise CheckpointError(f"convert knows no method {method!r}; there are {', '.join(OFFICIAL)}.")
    if method != "backbone" and likely and method not in likely:
        raise CheckpointError(f"{file} looks like {likely[0]}, not like {method}: give --method {likely[0]}.")
    families = sorted(set(found.values()))
    if not set(families) & set(OFFICIAL[method].families):
        other = "dinov2" if families == ["dinov2"] else "ijepa" if families == ["ijepa"] else "backbone"
        raise CheckpointError(
            f"{file} holds a backbone of kind {', '.join(families)}, and {OFFICIAL[method].name}'s are "
            f"{' or '.join(OFFICIAL[method].families)}: give --method {other}."
        )
    return method


def _choose(file: Path, entry: Official, which: str | None, found: Mapping[str, str]) -> str:
    """The prefix of the backbone to convert."""
    fitting = [root for root, family in found.items() if family in entry.families]
    if which is not None:
        wanted = entry.roots.get(which)
        if wanted not in fitting:
            copies = [name for name, root in entry.roots.items() if root in fitting]
            held = f"only the {copies[0]}" if copies else "one copy without a name"
            raise CheckpointError(f"{file} holds no {which} of {entry.name}, {held}: leave --which out.")
        return str(wanted)
    for root in (*entry.roots.values(), ""):
        if root in fitting:
            return root
    if len(fitting) > 1:
        raise CheckpointError(
            f"{file} holds {len(fitting)} backbones, under {listed(fitting)}, and {entry.name} names none of them: "
            "give the --method that they are from, or save the one you want alone."
        )
    return fitting[0]


def _native(
    tensors: Mapping[str, Tensor], root: str, found: Mapping[str, str], sizes: Sizes, classifier: bool = False
) -> Native:
    deeper = [other for other in found if other != root and other.startswith(root)]
    own = {
        name.removeprefix(root): tensor
        for name, tensor in tensors.items()
        if name.startswith(root) and not any(name.startswith(other) for other in deeper)
    }
    return convert(own, found[root], sizes, classifier)


def _whole(
    method: str, read: Checkpoint, root: str, found: Mapping[str, str], native: Native, sizes: Sizes, heads: int | None
) -> tuple[SSLModel | None, dict[str, list[str]], list[str]]:
    """(the method's model or None, where each converted tensor went, notes)."""
    entry = OFFICIAL[method]
    names = {f"{root}{name}": places for name, places in native.names.items()}
    if method == "backbone":
        return None, names, []
    natives = {root: native}
    if method in wholes.MAKERS:  # the other copies matter to the whole alone
        others = [prefix for prefix in found if prefix in entry.roots.values() and prefix != root]
        natives |= {prefix: _native(read.tensors, prefix, found, sizes) for prefix in others}
    fields = {ours: read.args[given] for given, ours in entry.args.items() if given in read.args}
    try:
        model, placed = wholes.whole(method, wholes.Parts(read.tensors, natives, root, fields, heads))
    except wholes.NotWholeError as error:
        return None, names, [str(error)]
    for prefix, other in natives.items():
        if prefix != root:
            placed |= {f"{prefix}{name}": [f"ssl: {place}" for place in at] for name, at in other.names.items()}
    defaults = [ours for ours in entry.args.values() if ours not in fields]
    notes = [f"taken from the file's training arguments: {', '.join(fields)}"] if fields else []
    notes += [f"not told by the file, so the method's default in ssl/: {', '.join(defaults)}"] if defaults else []
    notes += [f"all other settings in ssl/config.json that no tensor tells are hf_ssl's defaults of {entry.name}"]
    if method == "mae":
        notes.append("a patch's pixels assumed in MAE's order: row, column, channel")
    if method == "mae" and heads is None:
        found = model.config.decoder_num_heads  # type: ignore[attr-defined]
        notes.append(f"{found} attention heads assumed in the decoder; --decoder_num_heads says otherwise")
    return model, names | placed, notes


def _picture_notes(
    processor: SSLImageProcessor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> list[str]:
    """How pictures are made ready, as far as no flag states it."""
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}.get(processor.num_channels, f"of {processor.num_channels} channels")
    share = round(100 * processor.eval_crop_pct, 1)
    notes = [f"pictures assumed to be {kind}, values 0 to 1; resized bicubically, and the middle {share:g} % is taken"]
    missing = [name for name, given in (("mean", mean), ("std", std)) if given is None]
    if missing:
        flags = ", ".join(f"--image_{name}" for name in missing)
        verb = "say" if missing[1:] else "says"
        notes.append(f"pictures are normalised by ImageNet's {' and '.join(missing)}; {flags} {verb} otherwise")
    return notes


def _dtype_notes(tensors: Mapping[str, Tensor], root: str, native: Native) -> list[str]:
    kinds = Counter(tensors[f"{root}{name}"].dtype for name in native.names)
    cast = [str(kind).removeprefix("torch.") for kind in kinds if kind.is_floating_point and kind != torch.float32]
    return [f"the file's {', '.join(sorted(cast))} weights are saved as float32"] if cast else []


def _left_out(read: Checkpoint, used: Mapping[str, Any], root: str, found: Mapping[str, str]) -> dict[str, str]:
    """Name -> why, of all that was not converted."""
    others = [other for other in found if other and other != root]
    left = {}
    for name in read.tensors:
        if name not in used:
            copy = next((other for other in others if name.startswith(other)), None)
            left[name] = f"another copy of the backbone, {copy[:-1]}" if copy else "no part of what was converted"
    return left | dict.fromkeys(read.others, "no weights: state and settings of the run that made the file")


# --- what is written ----------------------------------------------------------------------------------------------


def _processor(
    native: PreTrainedModel,
    image_size: tuple[int, int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    model: SSLModel | None,
) -> SSLImageProcessor:
    kind = SSLImageProcessor if model is None else model.processor_class
    height, width = image_size or backbones.image_size(native.config)
    return kind(
        size={"height": height, "width": width},
        num_channels=native.config.num_channels,
        image_mean=None if mean is None else list(mean),
        image_std=None if std is None else list(std),
    )


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file: give a folder.")
    held = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    others = [name for name in held if not any(fnmatch(name, mine) for mine in _WRITTEN)]
    if held and (others or REPORT not in held):
        raise CheckpointError(f"{output} holds {listed(others or held, 3)}, none of convert's: give another --output.")
    if held and not overwrite:
        raise CheckpointError(f"{output} holds a converted model already; --overwrite replaces it.")


@torch.no_grad()
def _parity(folder: Path, native: PreTrainedModel) -> float:
    """Load ``folder`` afresh and compare it on random pictures; the largest difference, relative to the features."""
    is_classifier = backbones.model_kind(native) == "classifier"
    auto = AutoModelForImageClassification if is_classifier else AutoModel
    loaded = loading.load_pretrained(auto, folder, dtype=torch.float32).eval()
    size = backbones.image_size(native.config)
    pixels = torch.randn(1, native.config.num_channels, *size, generator=torch.Generator().manual_seed(0))
    ours, theirs = native(pixels)[0], loaded(pixels)[0]
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE:  # NaN as well
        raise CheckpointError(
            f"The converted model's features are not finite, or differ by {difference:.2g} of their size once saved "
            "and loaded; nothing was written."
        )
    return difference


def _write_report(folder: Path, file: Path, done: Conversion) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    report = {
        "file": file.name, "sha256": digest.hexdigest(), "method": done.method, "root": done.root,
        "architecture": done.about, "notes": done.notes, "converted": done.names, "left_out": done.left_out,
    }  # fmt: skip
    (folder / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def grouped(left_out: Mapping[str, str]) -> list[str]:
    """``Conversion.left_out`` in one line per reason: ``predictor.* (20), queue: why``."""
    groups: dict[str, Counter[str]] = {}
    for name, why in left_out.items():
        groups.setdefault(why, Counter())[name.partition(".")[0]] += 1
    return [
        ", ".join(stem if stem in left_out else f"{stem}.* ({count})" for stem, count in stems.items()) + f": {why}"
        for why, stems in groups.items()
    ]


_FEATURES = {"resnet": "the average over the last map", "ijepa": "the average over patches"}
_READING = {
    "resnet": "outputs.pooler_output.flatten(1)",
    "ijepa": "outputs.last_hidden_state.mean(1)",
}
_CARD = """{begin}
# {name}: {about}

Converted from `{file}` with [hf_ssl](https://pypi.org/project/hf-ssl/). Weights and licence are its authors'.

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import load_image

image = {picture}
processor = AutoImageProcessor.from_pretrained("{repo}")
model = AutoModel.from_pretrained("{repo}")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
features = {feature}
```

{lines}
{cite}
{end}
"""


def _card(
    entry: Official, method: str, file: Path, done: Conversion, native: PreTrainedModel, output: Path
) -> ModelCard:
    paper: Paper | None = None
    if method in METHODS:
        paper = load(method).paper
    elif entry.title:
        paper = Paper(entry.name, entry.title, entry.arxiv, f"{method}{entry.arxiv[:2]}", "", "")
    classifier = backbones.model_kind(native) == "classifier"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if classifier else "image-feature-extraction",
        tags=["hf_ssl", "self-supervised", method] if paper else ["hf_ssl"],
    )
    lines = [f"- {note}" for note in done.notes]
    lines += ["- `ssl/` holds the whole method, to go on training with hf_ssl"] if done.whole else []
    lines += [f"- left out: {line}" for line in grouped(done.left_out)]
    text = _CARD.format(
        begin=BEGIN, end=END, name=paper.name if paper else "Backbone", about=done.about, file=file.name,
        picture=picture_code(native.config.num_channels, (224, 224)), repo="path/or/repo",
        feature=_READING.get(native.config.model_type, "outputs.last_hidden_state[:, 0]"),
        lines="\n".join(lines), cite=f"\n```bibtex\n{citation(paper)}\n```" if paper else "",
    )  # fmt: skip
    earlier = output / "README.md"
    card = ModelCard(f"---\n{data}\n---\n\n{text}")
    return merged(card, earlier.read_text(encoding="utf-8")) if earlier.is_file() else card
