"""The exported folder: its root is the native model and its evaluation processor, ``ssl/`` is the whole method."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModelForPreTraining

from ..methods import register
from ..modeling import SSLModel
from ..processing import SSLImageProcessor
from .card import model_card


def export(model: SSLModel, processor: SSLImageProcessor, path: str | Path, run: dict[str, Any] | None = None) -> None:
    """Write ``model`` so that plain ``AutoModel.from_pretrained(path)`` loads its backbone, without hf_ssl.

    path/: native config, safetensors, processor, card, labelled rows. path/ssl/: heads, teacher, buffers, views
    (``AutoModelForPreTraining.from_pretrained(path, subfolder="ssl")`` once hf_ssl is imported). ``run`` is run.json's
    content; its results and command go on the card.
    """
    path = Path(path)
    model.export_backbone.save_pretrained(path)
    processor.native_processor().save_pretrained(path)
    model.save_pretrained(path / "ssl")
    processor.save_pretrained(path / "ssl")
    run = run or {}
    if run.get("labeled"):
        (path / "labeled_rows.json").write_text(json.dumps(run["labeled"]))
    model_card(model, run).save(path / "README.md")


def load_method(path: str | Path) -> tuple[SSLModel, SSLImageProcessor]:
    """The whole method and its view recipe from a run folder, its ``ssl/`` or a checkpoint.

    Raises FileNotFoundError if the folder holds no method (a native model alone has no heads to go on with).
    """
    register()
    path = Path(path)
    for folder in (path / "ssl", path):
        if (folder / "config.json").is_file() and AutoConfig.from_pretrained(folder).model_type.startswith("ssl_"):
            return AutoModelForPreTraining.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    raise FileNotFoundError(
        f"{path} holds no hf_ssl method: give a run folder (with ssl/), its ssl/ folder or a checkpoint-N folder"
    )
