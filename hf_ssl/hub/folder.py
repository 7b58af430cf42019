"""The published folder: its root is the native model and its evaluation processor, ``ssl/`` is the whole method."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoImageProcessor, AutoModelForPreTraining, PreTrainedModel

from .. import loading
from ..documents import read_json
from ..evaluation import load_native
from ..files import whole_file, whole_folder
from ..finite import check_finite
from ..modeling import SSLModel
from ..processing import SSLImageProcessor
from ..processing.published import FOLDER, method_folder
from ..untouched import untouched
from .card import merged, model_card
from .errors import explain_reading
from .privacy import scrub

TOLERANCE = 1e-5  # of a feature, relative to the largest
README, PICTURES = "README.md", "pictures"
# Everything that a published folder consists of; a run folder holds more, which stays at home.
_ROOT = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "preprocessor_config.json", "processor_config.json", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.model", "labeled_rows.json",
)  # fmt: skip

_STALE = ("model*.safetensors", "model.safetensors.index.json", "labeled_rows.json", "ssl/model*.safetensors*")
_WITH_PATHS = ("trainer_state.json", "training_args.json", "skipped_images.json")  # of a checkpoint
_CAPTIONS = {
    "neighbours": "Pictures drawn blindly and their nearest neighbours, before and after training",
    "filled_in": "Pictures, the part that the model saw, and what it filled in",
}


class ParityError(ValueError):
    """The native model as plain transformers loads it is not the trained one."""


def export(model: SSLModel, processor: SSLImageProcessor, path: str | Path, run: dict[str, Any] | None = None) -> None:
    """Write ``model`` so that plain ``AutoModel.from_pretrained(path)`` loads its backbone, without hf_ssl.

    path/: native config, safetensors, processor, card, labelled rows. path/ssl/: heads, teacher, buffers, views
    (``SimCLRForPreTraining.from_pretrained(path)`` finds them). ``run`` is run.json's content; its results and command
    go on the card. The weights are float32, also after a start from a bfloat16 checkpoint, unless the method was
    loaded with another ``dtype``. What a user wrote around the generated part of an earlier README.md stays. The
    folder changes when all of it is written; WriteError (an OSError): it is as it was. NonFiniteError: a weight is NaN
    or infinite.
    """
    check_finite(model, f"{path} is not written")
    with whole_folder(path, _STALE) as folder:
        _write(model, processor, folder, run)
        _card(model, path, run).save(folder / README)


def write_model(
    model: SSLModel, processor: SSLImageProcessor, path: str | Path, run: dict[str, Any] | None = None
) -> None:
    """``export`` without the card; NonFiniteError where a weight is NaN or infinite."""
    check_finite(model, f"{path} is not written")
    with whole_folder(path, _STALE) as folder:
        _write(model, processor, folder, run)


def _write(model: SSLModel, processor: SSLImageProcessor, path: Path, run: dict[str, Any] | None) -> None:
    _published(model).save_pretrained(path)
    processor.native_processor().save_pretrained(path)
    model.save_pretrained(path / FOLDER)
    processor.save_pretrained(path / FOLDER)
    if run and run.get("labeled"):
        (path / "labeled_rows.json").write_text(json.dumps(run["labeled"]))


def _published(model: SSLModel) -> PreTrainedModel:
    """The native model in the precision that the method was loaded in: of a teacher, float32 even then, a copy."""
    native = model.export_backbone
    wanted = next(model.backbone.parameters()).dtype
    return native if native.dtype == wanted else copy.deepcopy(native).to(wanted)  # type: ignore[arg-type]


def write_card(
    model: SSLModel, path: str | Path, run: dict[str, Any] | None = None, repo_id: str | None = None
) -> None:
    """The card of ``path``, with the pictures that lie in it and what users wrote into an earlier one."""
    card = _card(model, path, run, repo_id)
    with whole_file(Path(path, README)) as file:
        card.save(file)


def _card(model: SSLModel, path: str | Path, run: dict[str, Any] | None, repo_id: str | None = None) -> ModelCard:
    readme = Path(path, README)
    card = model_card(model, run or {}, repo_id, pictures_in(path))
    return merged(card, *([readme.read_text(encoding="utf-8")] if readme.is_file() else []))


def pictures_in(path: str | Path) -> dict[str, str]:
    """Path in the repo -> caption, of the pictures that lie in a folder for its card."""
    found = sorted(Path(path, PICTURES).glob("*.png"))
    captions = {file: _CAPTIONS.get(file.stem, file.stem.replace("_", " ").capitalize()) for file in found}
    return {f"{PICTURES}/{file.name}": caption for file, caption in captions.items()}


def files(path: str | Path) -> dict[str, Path]:
    """Path in the repo -> file, of everything in a published folder but the card."""
    path = Path(path)
    found = [file for pattern in (*_ROOT, f"{FOLDER}/*", f"{PICTURES}/*.png") for file in path.glob(pattern)]
    return {file.relative_to(path).as_posix(): file for file in sorted(set(found)) if file.is_file()}


def publishable(file: Path) -> str | bytes:
    """What is uploaded of a file: its path, or its content without the paths that its JSON holds."""
    if file.name == "labeled_rows.json":  # class names may well begin with a slash
        rows = read_json(file)
        return json.dumps({**rows, "dataset": scrub(rows.get("dataset"))}).encode()
    if file.name in _WITH_PATHS:
        return json.dumps(scrub(read_json(file)), indent=2).encode()
    return str(file)


@untouched()
def load_method(where: str | Path, **options: Any) -> tuple[SSLModel, SSLImageProcessor]:
    """The whole method and its view recipe from a run folder, its ``ssl/``, a checkpoint or a Hub repo.

    options: revision, token. Raises FileNotFoundError if there is no method (a native model alone has no heads to go
    on with), OSError if there is no such repo.
    """
    local = Path(where).expanduser()
    folder = None
    if not local.is_dir():
        try:
            folder = method_folder(str(where), options)
        except OSError as error:
            raise explain_reading(error, str(where)) from error
    elif any((local / inner / "config.json").is_file() for inner in ("", FOLDER)):
        folder = _local_folder(local)
    if folder is None:
        raise FileNotFoundError(
            f"{where} holds no hf_ssl method: give a run folder (with ssl/), its ssl/ folder, a checkpoint-N folder "
            "or a repo that hf_ssl published"
        )
    place = str(local / folder) if local.is_dir() else str(where)
    options |= {"subfolder": folder} if not local.is_dir() and folder else {}
    model = loading.load_pretrained(AutoModelForPreTraining, place, **options)
    model.processor = loading.load_pretrained(AutoImageProcessor, place, **options)
    return model, model.processor


def _local_folder(path: Path) -> str | None:
    for folder in (FOLDER, ""):
        if (path / folder / "config.json").is_file():
            config = loading.load_pretrained(AutoConfig, path / folder)
            if config.model_type.startswith("ssl_"):
                return folder
    return None


@torch.no_grad()
def check_parity(path: str | Path, model: SSLModel, processor: SSLImageProcessor, images: int = 4) -> float:
    """Load the root of ``path`` as plain transformers would and compare it with ``model``; the largest difference.

    Both see the same random pictures, through the saved native processor and ours. Features, a classifier's logits
    and an image-text model's image embeddings may differ by TOLERANCE of their largest value. Raises ParityError.
    """
    native, reader, kind = load_native(str(path), device=model.device)
    native.to(model.dtype).eval()
    rng, side = np.random.default_rng(0), (processor.size["height"] + 7, processor.size["width"] + 3)
    pictures = [rng.integers(0, 256, (*side, processor.num_channels), np.uint8) for _ in range(images)]
    pixels = _pixels(getattr(reader, "image_processor", reader), pictures)
    if not torch.allclose(pixels, _pixels(processor.eval_processor(), pictures), rtol=0, atol=1e-6):
        raise ParityError(f"{path}: its image processor makes other pictures of the same files than training did.")
    pixels = pixels.to(model.device, model.dtype)
    worst = 0.0
    with untouched(model):
        for name, outputs in _outputs(native, _published(model.eval()), kind, pixels).items():
            loaded, trained = outputs
            scale = max(float(trained.abs().max()), 1e-12)
            worst = max(worst, float((loaded - trained).abs().max()) / scale)
            if not worst <= TOLERANCE:  # NaN as well
                raise ParityError(
                    f"{path}: plain transformers loads a model whose {name} differ by {worst:.2g} of their size from "
                    f"the trained one's (at most {TOLERANCE:g} is right)."
                )
    return worst


def _pixels(reader: Any, pictures: list[np.ndarray]) -> torch.Tensor:
    # native processors guess where the channels are, and 1, 3 or 4 rows would mislead them
    return reader(pictures, return_tensors="pt", input_data_format="channels_last")["pixel_values"]


def _outputs(native: Any, mine: Any, kind: str, pixels: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    from ..evaluation.natives import image_features

    found = {"features": (image_features(native, pixels), image_features(mine, pixels))}
    if kind == "classifier":
        found["logits"] = (native(pixels).logits, mine(pixels).logits)
    return found
