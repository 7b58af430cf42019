"""The exported folder: its root is the native model and its evaluation processor, ``ssl/`` is the whole method."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig, AutoImageProcessor, AutoModelForPreTraining

from ..methods import register
from ..modeling import Paper, SSLModel
from ..processing import SSLImageProcessor

_TEMPLATE = "model_cards/template.md"


def export(model: SSLModel, processor: SSLImageProcessor, path: str | Path, run: dict[str, Any] | None = None) -> None:
    """Write ``model`` so that plain ``AutoModel.from_pretrained(path)`` loads its backbone, without hf_ssl.

    path/: native config, safetensors, evaluation processor, model card. path/ssl/: heads, teacher, buffers, views
    (``AutoModelForPreTraining.from_pretrained(path, subfolder="ssl")`` once hf_ssl is imported). ``run`` is run.json's
    content; its results and command go on the card.
    """
    path = Path(path)
    model.export_backbone.save_pretrained(path)
    processor.eval_processor().save_pretrained(path)
    model.save_pretrained(path / "ssl")
    processor.save_pretrained(path / "ssl")
    model_card(model.paper, run or {}, type(model.export_backbone).__name__).save(path / "README.md")


def model_card(paper: Paper, run: dict[str, Any], architecture: str) -> ModelCard:
    """The card of an exported repo: what it is, how to load it, what it scores beside its baselines."""
    from ..evaluation import markdown_table

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["hf_ssl", "self-supervised", paper.name.lower()],
        datasets=[run["dataset"]] if "/" in run.get("dataset", "") and not Path(run["dataset"]).exists() else None,
    )
    results = run.get("results") or []
    return ModelCard.from_template(
        data,
        template_path=str(resource(_TEMPLATE)),
        paper=paper,
        architecture=architecture,
        dataset=run.get("dataset", "an unnamed dataset"),
        command=run.get("command", ""),
        results=markdown_table(results) if results else "",
    )


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


def resource(name: str) -> Path:
    """A file that lies at the top of a checkout and inside the package of an installed wheel."""
    package = Path(__file__).parents[1]
    return next((root / name for root in (package, package.parent) if (root / name).exists()), package / name)
