"""The model card of a published repo: what it is, how to load it, how it was made, what it scores beside baselines."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from .. import backbones
from ..data.files import printable_record
from ..evaluation.report_table import heading
from ..methods import family_of, name_of
from ..modeling import Paper, SSLModel
from ..pixels import MODES
from .privacy import scrub, scrub_command
from .results import eval_results, is_hub_id

_TEMPLATE = "model_cards/template.md"
BEGIN = "<!-- hf_ssl:begin: written anew by every push; what stands before this line or after the end is yours -->"
END = "<!-- hf_ssl:end -->"
_OURS = re.compile(r"<!-- hf_ssl:begin\b[^>]*-->.*?<!-- hf_ssl:end -->", re.S)
_LICENCES = {  # of the built-in pictures
    "emoji": "Google's drawings Apache-2.0, Twitter's CC-BY-4.0, names MIT",
    "fashion-mnist": "MIT",
}

_RENDERED = {  # how built-in drawings, which are transparent, become pictures
    "emoji": ", transparent drawings laid on white",
    "emoji:placed": ", transparent drawings placed on backgrounds of one colour",
}


@dataclass(frozen=True)
class _Wording:
    """What a card says of what a method publishes. In a snippet <repo>, <picture> and <feature> are filled in."""

    task: str  # the Hub's name of the pipeline that the root serves
    tag: str
    taught_with: str
    snippet: str
    reading: str
    baselines: str
    limits: str
    without_pipeline: str = ""  # the snippet for pictures that are not RGB: pipelines make every picture RGB


_PIPELINE = """from PIL import Image
from transformers import pipeline

image = <picture>
classify = pipeline("<task>", model="<repo>")
print(classify(image<arguments>))"""
_LOADED = """import torch
from PIL import Image
from transformers import <processor>, <model>
from transformers.image_utils import load_image

image = <picture>
processor = <processor>.from_pretrained("<repo>")
model = <model>.from_pretrained("<repo>")
with torch.no_grad():
    <answer>"""
_BACKBONE = _Wording(
    "image-feature-extraction",
    "self-supervised",
    "without labels",
    """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import load_image

image = <picture>
processor = AutoImageProcessor.from_pretrained("<repo>")
model = AutoModel.from_pretrained("<repo>")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
features = <feature>
print(features.shape)""",
    "These are the features that evaluation uses: compare them by cosine similarity, or put a classifier on them.",
    "Raw pixels and the same network without training are measured the same way.",
    "It names nothing by itself: labels enter with a kNN bank, a probe or fine-tuning.",
)
_WORDS = {
    "classifier": _Wording(
        "image-classification",
        "semi-supervised",
        "on a few labels and on images without labels",
        _PIPELINE.replace("<arguments>", ""),
        "The root holds what was evaluated: the moving average (EMA) of the weights, unless stated otherwise below.",
        "The commonest class, and the weights that are not published, are measured the same way.",
        "It knows the classes it was trained on and answers with one of them to any picture.",
        _LOADED.replace("<processor>", "AutoImageProcessor")
        .replace("<model>", "AutoModelForImageClassification")
        .replace("<answer>", 'logits = model(**processor(image, return_tensors="pt")).logits')
        + "\nprint(model.config.id2label[logits.argmax(-1).item()])",
    ),
    "two_towers": _Wording(
        "zero-shot-image-classification",
        "image-text",
        "on images and their texts",
        _PIPELINE.replace("<arguments>", ', candidate_labels=["a cat", "a dog"], hypothesis_template="{}"'),
        "`AutoModel` and `AutoProcessor` load the two towers and their processor.",
        "Chance, or the commonest class, is measured the same way.",
        "It answers best to texts like those it was trained on; others it may not know at all.",
        _LOADED.replace("<processor>", "AutoProcessor")
        .replace("<model>", "AutoModel")
        .replace("<answer>", "outputs = model(**processor(<both>))")
        .replace("<both>", 'text=["a cat", "a dog"], images=image, padding=True, return_tensors="pt"')
        + "\nprint(outputs.logits_per_image.softmax(-1))",
    ),
}


_PICTURES = {  # <blank>: a picture to try the snippet with; by channels
    1: 'load_image(<blank>).convert("L")  # yours: load_image("photo.jpg").convert("L")',
    3: 'load_image(<blank>)  # yours: load_image("photo.jpg")',
    4: '<blank>  # yours: Image.open("photo.png").convert("RGBA")',
}
_DEEP = "16-bit grey, which Pillow cuts off at 255, is the exception: training saw it divided by 257."
_OPENING = {  # how training saw files; by channels
    1: "Training saw files as this snippet opens them: upright, grey, an alpha channel dropped. " + _DEEP,
    3: (
        "Training saw files as the pipelines and `load_image` open them: upright, RGB, an alpha channel dropped with "
        "the colours under it kept (an image processor that is handed an image with alpha lays it on white: "
        '`convert("RGB")` first). ' + _DEEP
    ),
}


def model_card(
    model: SSLModel, run: dict[str, Any], repo_id: str | None = None, pictures: dict[str, str] | None = None
) -> ModelCard:
    """The card of a run of ``model``. ``run``: what is known of it, as run.json has it; what is missing is left out.

    ``pictures``: caption of each file to show, by its path in the repo. Paths are cut short and tokens hidden.
    """
    from ..evaluation import markdown_table

    run = printable_record(run)
    paper: Paper = model.paper
    words = _WORDS.get(model.publishes, _BACKBONE)
    native, side = model.export_backbone, _side(model)
    base, dataset = (run.get("init") or {}).get("from_pretrained"), run.get("dataset") or ""
    shown = scrub(run)
    title = f"{paper.name} on {scrub(dataset) or 'an unnamed dataset'}"
    scores = eval_results(run)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=words.task,
        tags=[
            "hf_ssl",
            paper.name.lower(),
            family_of(name_of(model.config.model_type)).replace("_", "-"),
            "self-supervised",
            words.tag,
        ],
        datasets=[name] if is_hub_id(name := dataset.partition(":")[0]) else None,
        base_model=base if is_hub_id(base) else None,
        license=run.get("license"),
        model_name=(repo_id or title).split("/")[-1] if scores else None,
        eval_results=scores or None,
    )
    data.tags = list(dict.fromkeys([*(data.tags or []), *(run.get("tags") or [])]))
    results = shown.get("results") or []
    return ModelCard.from_template(
        data,
        template_path=str(resource(_TEMPLATE)),
        begin=BEGIN,
        end=END,
        title=title,
        paper=paper,
        citation=citation(paper),
        architecture=type(native).__name__,
        parameters=f"{sum(parameter.numel() for parameter in native.parameters()) / 1e6:.2f}",
        words=words,
        snippet=_snippet(words, native, repo_id or "path/or/repo", side),
        opening=_OPENING.get(_channels(native), ""),
        run=shown,
        repo=repo_id or "path/or/repo",
        stem=type(model).__name__,
        facts=_facts(run, side),
        command=scrub_command(run.get("command") or ""),
        licences=_licences(run, base, dataset),
        results=markdown_table([_headed(row) for row in results]) if results else "",
        pictures=pictures or {},
    )


def _headed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table under headings that a reader knows, without a classifier's matrices."""
    figures = {key: value for key, value in row.items() if not isinstance(value, (list, dict))}
    return {key if key in ("protocol", "model") else heading(key): value for key, value in figures.items()}


def _snippet(words: _Wording, native: PreTrainedModel, repo: str, side: tuple[int, int] | None) -> str:
    channels, side = _channels(native), side or (224, 224)
    snippet = words.snippet if channels == 3 else words.without_pipeline or words.snippet
    picture = '<blank>  # yours: "photo.jpg"' if "pipeline(" in snippet else None
    filled = {"<picture>": picture_code(channels, side, picture), "<repo>": repo, "<task>": words.task}
    if words is _BACKBONE:
        filled["<feature>"] = _feature(native, channels, side)
    for name, text in filled.items():
        snippet = snippet.replace(name, text)
    imports = {"Image.": "from PIL import Image\n", "load_image(": "from transformers.image_utils import load_image\n"}
    for used, line in imports.items():
        snippet = snippet if used in snippet else snippet.replace(line, "")
    return snippet


def picture_code(channels: int, side: tuple[int, int], code: str | None = None) -> str:
    """The expression of a picture (height, width) to try a snippet with, and how to open one's own as training did."""
    other = f"torch.zeros({channels}, {side[0]}, {side[1]})  # yours, uint8 or 0 to 1"
    blank = f'Image.new("{MODES.get(channels)}", {(side[1], side[0])})'
    return (code or _PICTURES.get(channels, other)).replace("<blank>", blank)


def _channels(native: PreTrainedModel) -> int:
    return getattr(getattr(native.config, "vision_config", native.config), "num_channels", 3)


def _feature(native: PreTrainedModel, channels: int, side: tuple[int, int]) -> str:
    """The code that reads off the native outputs what ``backbones.pool`` does."""
    if backbones.has_cls(native):
        return "outputs.last_hidden_state[:, 0]"
    training = native.training
    with torch.no_grad():
        outputs = native.eval()(torch.zeros(1, channels, *side, device=native.device, dtype=native.dtype))
    native.train(training)
    if getattr(outputs, "pooler_output", None) is not None:
        return "outputs.pooler_output.flatten(1)"
    return f"outputs.last_hidden_state.mean({'(2, 3)' if outputs.last_hidden_state.ndim == 4 else 1})"


def _side(model: SSLModel) -> tuple[int, int] | None:
    """(height, width) of evaluation pictures, where it is known: the processor's, else the position table's."""
    if model.processor is not None:
        return model.processor.size["height"], model.processor.size["width"]
    config = model.export_backbone.config
    vision = getattr(config, "vision_config", config)
    return backbones.image_size(vision) if hasattr(vision, "image_size") else None


def _facts(run: dict[str, Any], side: tuple[int, int] | None) -> dict[str, str]:
    """How it was trained, one fact a line; only what is known."""
    arguments, machine = run.get("arguments") or {}, run.get("environment") or {}
    steps, images, seconds = run.get("steps"), run.get("num_images"), run.get("time_seconds")
    seen = (steps or 0) * (run.get("images_per_step") or 0)
    facts = {"Data": str(scrub(run.get("dataset") or ""))}
    if facts["Data"]:
        facts["Data"] += f", split {run['split']}" if run.get("split") else ""
        facts["Data"] += f", {images:,} images" if images else ""
        facts["Data"] += _RENDERED.get(facts["Data"].partition(",")[0], "")
    if rows := _rows(run.get("division") or {}):
        facts["Rows"] = str(scrub(rows))
    if seen:
        passes = f", {seen / images:.1f} passes over the data" if images else ""
        facts["Images seen"] = f"{seen:,} in {steps:,} steps of {run['images_per_step']:,}{passes}"
    elif steps:
        facts["Steps"] = f"{steps:,}"
    if published := run.get("published"):
        facts["Published weights"] = f"the {published['weights']} ones: {published['why']}"
    start = (run.get("init") or {}).get("from_pretrained")
    facts["Start"] = f"the weights of {scrub(start)}" if start else "random weights"
    if recipe := arguments.get("recipe"):
        facts["Recipe"] = f"`{PurePath(str(recipe)).name}`"
    if side:
        facts["Picture size"] = f"{side[0]} × {side[1]} pixels"
    if machine:
        gpus = machine.get("gpus") or "none"
        cores = f"{machine.get('cpus')} CPU cores"
        facts["Hardware"] = f"{cores}, no GPU" if gpus == "none" else f"{gpus}, {cores}"
        names = ("hf_ssl", "torch", "transformers", "datasets", "accelerate", "python")
        facts["Software"] = ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name))
    if seconds:
        facts["Wall time"] = _duration(seconds)
    if run.get("seed") is not None:
        facts["Seed"] = str(run["seed"])
    return {name: text for name, text in facts.items() if text}


def _rows(division: dict[str, Any]) -> str:
    """How many rows trained, validated and tested, and by which rule; "" where it is not recorded."""
    if "test" not in division:
        known, of = division.get("trained_on"), division.get("measured")
        return f"{known} of the {of} pictures that are measured on were trained on as well" if known else ""
    counts = [
        f"{'a stream' if n is None else f'{n:,}'} to {verb}"
        for verb, n in zip(("train", "validate", "test"), (division.get(k) for k in ("train", "validation", "test")))
    ]
    return f"{', '.join(counts)}. {division.get('rule') or ''}".strip()


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _licences(run: dict[str, Any], base: Any, dataset: str) -> dict[str, str]:
    """Of the data, of the weights training started from, of the model: what is known, else that it is not."""
    known = run.get("licences") or {}
    built_in = _LICENCES.get(dataset.partition(":")[0])
    found = {"Training data": built_in or known.get("dataset") or "not stated; see where it comes from"}
    if base:
        found["Base model"] = known.get("base_model") or f"not stated; see {scrub(base)}"
    found["These weights"] = run.get("license") or "not stated by who published them"
    return found


def citation(paper: Paper) -> str:
    """The BibTeX entry of a paper on arXiv."""
    century = f"20{paper.arxiv[:2]}"
    authors = f"  author = {{{paper.authors}}},\n" if paper.authors else ""
    return (
        f"@misc{{{paper.bibtex},\n{authors}  title = {{{paper.title}}},\n  year = {{{century}}},\n"
        f"  eprint = {{{paper.arxiv}}},\n  archivePrefix = {{arXiv}},\n"
        f"  url = {{https://arxiv.org/abs/{paper.arxiv}}}\n}}"
    )


def merged(card: ModelCard, *earlier: str) -> ModelCard:
    """`card` with what users wrote into `earlier` cards (their text), the most important first.

    Kept are the text outside our markers, metadata of names that we do not write, further tags and a licence.
    """
    before, after = "", ""
    for text in earlier:
        old = _read(text)
        for name, value in old.data.to_dict().items():
            if getattr(card.data, name, None) is None and name != "model-index":
                setattr(card.data, name, value)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *(old.data.tags or [])]))
        if (ours := _OURS.search(old.text)) is None:
            before, after = before, _joined(after, old.text)
        else:
            before, after = _joined(before, old.text[: ours.start()]), _joined(after, old.text[ours.end() :])
    parts = (before, card.text.strip(), after)
    return ModelCard(f"---\n{card.data}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")


def _read(text: str) -> ModelCard:
    try:
        return ModelCard(text)
    except Exception:  # metadata that is no YAML: its text is still somebody's
        return ModelCard("---\n{}\n---\n" + text.rpartition("\n---")[2].lstrip())


def _joined(mine: str, other: str) -> str:
    mine, other = mine.strip(), other.strip()
    return mine if other in mine else other if mine in other else f"{mine}\n\n{other}"


def resource(name: str) -> Path:
    """A file that lies at the top of a checkout and inside the package of an installed wheel."""
    package = Path(__file__).parents[1]
    return next((root / name for root in (package, package.parent) if (root / name).exists()), package / name)
