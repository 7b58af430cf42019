"""The model card of an exported repo: what it is, how to load it, what it scores beside its baselines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..modeling import Paper, SSLModel

_TEMPLATE = "model_cards/template.md"


@dataclass(frozen=True)
class _Wording:
    """What a card says of one family of methods."""

    task: str  # the Hub's name of the pipeline that the root serves
    tag: str
    taught_with: str
    snippet: str
    reading: str
    baselines: str


_BACKBONE = _Wording(
    "image-feature-extraction",
    "self-supervised",
    "without labels",
    """from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("path/or/repo")
model = AutoModel.from_pretrained("path/or/repo")
outputs = model(**processor(images=image, return_tensors="pt"))""",
    "The feature that was evaluated is the class token, `outputs.last_hidden_state[:, 0]`, of a ViT, and "
    "`outputs.pooler_output`\nof a convolutional or Swin model.",
    "Raw pixels and the untrained backbone are the baselines of the same protocol.",
)
_FAMILIES = {
    "semi_supervised": _Wording(
        "image-classification",
        "semi-supervised",
        "on a few labels and on images without labels",
        """from transformers import pipeline

classify = pipeline("image-classification", model="path/or/repo")
classify(image)""",
        "The root holds the moving average (EMA) of the weights, which is what was evaluated.",
        "The commonest class, and the last weights without the average, are shown beside it.",
    ),
    "image_text": _Wording(
        "zero-shot-image-classification",
        "image-text",
        "on images and their texts",
        """from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="path/or/repo")
classify(image, candidate_labels=["a cat", "a dog"], hypothesis_template="{}")""",
        "`AutoModel` and `AutoProcessor` load the two towers and their processor.",
        "Chance, or the commonest class, is shown beside each figure.",
    ),
}


def model_card(model: SSLModel, run: dict[str, Any]) -> ModelCard:
    """The card of a run of ``model``; ``run`` is run.json's content."""
    from ..evaluation import markdown_table

    paper: Paper = model.paper
    words = _FAMILIES.get(paper.family, _BACKBONE)
    dataset = run.get("dataset", "")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=words.task,
        tags=["hf_ssl", words.tag, paper.name.lower()],
        datasets=[dataset] if "/" in dataset and not Path(dataset).exists() else None,
    )
    results = run.get("results") or []
    return ModelCard.from_template(
        data,
        template_path=str(resource(_TEMPLATE)),
        paper=paper,
        architecture=type(model.export_backbone).__name__,
        dataset=dataset or "an unnamed dataset",
        command=run.get("command", ""),
        labeled=run.get("labeled"),
        taught_with=words.taught_with,
        snippet=words.snippet,
        reading=words.reading,
        baselines=words.baselines,
        results=markdown_table(results) if results else "",
    )


def resource(name: str) -> Path:
    """A file that lies at the top of a checkout and inside the package of an installed wheel."""
    package = Path(__file__).parents[1]
    return next((root / name for root in (package, package.parent) if (root / name).exists()), package / name)
