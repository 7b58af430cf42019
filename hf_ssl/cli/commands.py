"""The commands beside train and demo: evaluate, embed, pseudo-label, export, ... Each takes checked values."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..documents import read_json
from ..files import whole_file
from ..methods import METHODS, family_of
from ..spelling import nearest
from .console import CommandError, UsageError, quiet, say
from .fields import Flag, paper
from .flags import Parsed
from .runfolder import existing, read_run

_DATA = (
    Flag(
        "dataset",
        ("str",),
        None,
        "A folder, *.parquet, *.tar, a Hub id, emoji, emoji:placed or fashion-mnist.",
    ),
    Flag("image_column", ("str",), None, "Column with the image; found if not given.", optional=True),
    Flag("label_column", ("str",), None, "Column with the label; found if not given.", optional=True),
    Flag("allow_outside_files", ("bool",), False, "Let rows name files outside of their data set, and web addresses."),
    Flag(
        "max_images",
        ("int",),
        None,
        "At most so many images of a split; a fixed random draw.",
        optional=True,
        limits="[1, inf)",
    ),
    Flag("batch_size", ("int",), 256, "Images at once.", limits="[1, inf)"),
    Flag("num_workers", ("int",), 0, "Processes that decode.", limits="[0, 1024]"),
    Flag("device", ("str",), None, "Device: cpu, cuda, ...; default: the GPU if there is one.", optional=True),
)
_MEASURES = (
    "knn", "linear", "retrieval", "segmentation", "health", "low_shot", "classification", "zero_shot",
    "text_retrieval",
)  # fmt: skip
EVALUATE = (
    *_DATA,
    Flag("caption_column", ("str",), None, "Column with the texts; found if not given.", optional=True),
    Flag(
        "protocols",
        ("list",),
        None,
        f"Measures: {', '.join(_MEASURES)}; default: what suits the model.",
        optional=True,
    ),
    Flag("bank_split", ("str",), "train", "Split that kNN votes with and the probe learns from."),
    Flag("query_split", ("str",), "test", "Split that is scored; without one, a fixed fifth of the bank."),
    Flag("k", ("list",), "20,200", "Neighbours that vote."),
    Flag(
        "knn_precision",
        ("str",),
        "fp32",
        "Precision of kNN; bf16 is faster on CPUs and nearly exact.",
        choices=("fp32", "bf16"),
    ),
    Flag(
        "prompts",
        ("str",),
        None,
        "Texts for zero_shot: simple, or a YAML file such as {templates: ['a photo of a {}'], classes: {1: [a cat]}}.",
        optional=True,
    ),
    Flag("seed", ("int",), 0, "Seed of the untrained twin and the probe.", limits="[0, 4294967295]"),
    Flag("json", ("str",), None, "Write the rows to this file, all figures.", optional=True),
)
EMBED = (
    *_DATA,
    Flag("output", ("str",), None, "FILE.parquet, FILE.csv, FILE.npz or FILE.safetensors."),
    Flag("split", ("str",), "train", "Split to embed."),
    Flag("columns", ("list",), None, "Further columns to keep beside the labels.", optional=True),
)
PSEUDO_LABEL = (
    *(flag for flag in _DATA if flag.name != "label_column"),
    Flag("output", ("str",), None, "FILE.parquet with image, label, confidence, weight, index."),
    Flag("split", ("str",), "train", "Split to label."),
    Flag(
        "threshold", ("float",), 0.95, "Labels of at least this confidence have weight 1, others 0.", limits="[0, 1]"
    ),
    Flag("keep", ("str",), "all", "Which rows to write.", choices=("all", "confident")),
    Flag("held_out", ("bool",), False, "Label those too that the model's run keeps to validate and test on."),
)
EXPORT = (
    Flag("output", ("str",), None, "Folder to write; the native model in its root, the whole method in ssl/."),
    Flag("overwrite", ("bool",), False, "Write into a folder that holds a model already."),
)
REPORT = (
    Flag("dataset", ("str",), None, "Show these pictures instead of the run's own.", optional=True),
    Flag("max_images", ("int",), 1500, "At most so many pictures; a fixed random draw.", limits="[1, inf)"),
)
METHODS_FLAGS = (Flag("json", ("bool",), False, "As JSON, for programs."),)
_FORMATS = (".parquet", ".csv", ".npz", ".safetensors")


def _one_word(parsed: Parsed, command: str, what: str) -> str:
    if len(parsed.words) != 1:
        given = "nothing" if not parsed.words else " ".join(parsed.words)
        raise UsageError(f"{command}: give one {what}, not {given}.")
    return parsed.words[0]


def _required(parsed: Parsed, command: str, name: str, example: str) -> Any:
    if parsed.values.get(name) is None:
        raise UsageError(f"{command}: --{name} is missing, for example --{name} {example}.")
    return parsed.values[name]


def methods(parsed: Parsed) -> int:
    """Name, paper, arXiv id, family and one sentence of every method."""
    if parsed.words:
        raise UsageError(f"methods: {parsed.words[0]!r} is one word too many.")
    rows = []
    for name in METHODS:
        about = paper(name)
        rows.append({"name": name, "title": about["title"], "arxiv": about["arxiv"], "family": family_of(name)})
        rows[-1]["teaches"] = about["teaches"]
    if parsed.values.get("json"):
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    wide = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{wide}}  {row['teaches']}")
        print(f"{'':<{wide}}  {row['title']} (arXiv:{row['arxiv']}, {row['family']})")
    return 0


def evaluate(parsed: Parsed) -> int:
    """The baselines and the model itself, side by side."""
    name = _one_word(parsed, "evaluate", "MODEL (a folder or a Hub id)")
    spec = _required(parsed, "evaluate", "dataset", "emoji")
    values = _with_defaults(parsed, EVALUATE)
    measures = _choices(values["protocols"], _MEASURES, "--protocols") if values["protocols"] is not None else None
    if not all(str(k).isdigit() and int(k) > 0 for k in _listed(values["k"])):
        raise UsageError(f"evaluate: --k must be whole numbers such as 20,200, not {parsed.values.get('k')!r}.")
    _writable(values["json"], "--json")
    check_model(name, "evaluate")
    quiet()
    check_device(values["device"])
    from ..data.splits import divide, trained_on
    from ..evaluation import load_prompts, natural_measures
    from ..evaluation.report_table import OWN_ROWS
    from . import tables

    prompts = None if values["prompts"] is None else load_prompts(values["prompts"])
    columns = {key: values[key] for key in ("image_column", "label_column", "caption_column", "allow_outside_files")}
    explicit = "query_split" in parsed.values
    division = divide(
        spec, values["bank_split"], (spec,), values["query_split"], explicit=explicit, texts=True, **columns
    )
    pair = division.tests[0] if division.tests else None
    if pair is not None:
        say(*division.said)
    model, processor = open_model(name, values["device"])
    asked = natural_measures(model) if measures is None else measures
    if pair is None and (division.train.labels or division.train.has_captions):
        raise CommandError(" ".join(division.said))
    if pair is None or (not pair[0].labels and "text_retrieval" not in asked):
        raise CommandError(f"{spec} has no labels to evaluate with; give --label_column or another --dataset.")
    others = tables.other_weights(Path(name).expanduser()) if "classification" in asked else {}
    options = {
        key: values[key] for key in ("batch_size", "num_workers", "max_images", "device", "seed", "knn_precision")
    }
    options |= {"k": [int(k) for k in _listed(values["k"])], "prompts": prompts, "others": others}
    known, sentence = trained_on(read_run(Path(name).expanduser()), pair[1])
    say(*([sentence] if sentence else ()))
    rows = _rows(model, processor, pair, asked, options, measures is not None)
    rows = [row | {"trained_on": known} if known and row["model"] in OWN_ROWS else row for row in rows]
    tables.print_results(rows)
    if values["json"]:
        with whole_file(values["json"]) as file:
            file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        say(f"rows       {values['json']}")
    return 0


def _rows(model: Any, processor: Any, pair: Any, measures: tuple[str, ...], options: dict, asked: bool) -> list[dict]:
    """The table; where nobody `asked` for classification, pictures of other classes do without it."""
    from ..evaluation import LabelMismatchError
    from .tables import make_table

    try:
        return make_table(model, processor, [pair], measures, **options)
    except LabelMismatchError as error:
        if asked:
            raise
        say(f"Not classified: {error}")
        measures = tuple(measure for measure in measures if measure != "classification")
        return make_table(model, processor, [pair], measures, **(options | {"others": {}}))


def pseudo_label(parsed: Parsed) -> int:
    """A classifier's own labels for pictures, into a parquet file that any training loop reads."""
    name = _one_word(parsed, "pseudo-label", "MODEL (a folder or a Hub id)")
    spec = _required(parsed, "pseudo-label", "dataset", "pictures/")
    output = Path(_required(parsed, "pseudo-label", "output", "labels.parquet")).expanduser()
    values = _with_defaults(parsed, PSEUDO_LABEL)
    if output.suffix != ".parquet":
        raise UsageError(f"pseudo-label: --output ends in .parquet, not {output.suffix or 'nothing'!r}.")
    _writable(str(output), "--output")
    check_model(name, "pseudo-label")
    quiet()
    check_device(values["device"])
    from .. import evaluation
    from ..data.sources import load_source

    named = {key: values[key] for key in ("image_column", "allow_outside_files")}
    source = load_source(spec, values["split"], **named)
    if not values["held_out"]:
        source = _without_held(source, Path(name).expanduser())
    model, processor = open_model(name, values["device"])
    options = {key: values[key] for key in ("batch_size", "num_workers", "max_images", "device", "threshold", "keep")}
    found = evaluation.pseudo_label(model, source, processor, **options)
    evaluation.save_pseudo_labels(found, output)
    sure = round(sum(found["weight"]))
    say(f"{len(found):,} pseudo-labels in {output}, {sure:,} of them with confidence {values['threshold']:g} or more")
    counts = Counter(found["label"])
    say(*(f"  {counts[i]:>8,}  {label}" for i, label in enumerate(found.features["label"].names)))
    return 0


def _without_held(source: Any, model: Path) -> Any:
    """`source` less the pictures that the model's run validates or tests on: their labels are for another training."""
    from ..data.splits import free, recorded_division, whole_of

    division = recorded_division(read_run(model))
    if division is None or source.is_stream:
        return source
    left = free(division.held, whole_of(source, "train"))
    if len(left) < len(source):
        say(
            f"{len(source) - len(left)} of its {len(source)} pictures are left out: the run in {model} keeps them to "
            "validate or test on; --held_out labels them too."
        )
    return left


def embed(parsed: Parsed) -> int:
    """One feature vector per picture, into a file that holds no code."""
    name = _one_word(parsed, "embed", "MODEL (a folder or a Hub id)")
    spec = _required(parsed, "embed", "dataset", "emoji")
    output = Path(_required(parsed, "embed", "output", "features.parquet")).expanduser()
    if output.suffix not in _FORMATS:
        raise UsageError(f"embed: --output ends in {', '.join(_FORMATS)}, not {output.suffix or 'nothing'!r}.")
    _writable(str(output), "--output")
    check_model(name, "embed")
    values = _with_defaults(parsed, EMBED)
    quiet()
    check_device(values["device"])
    from ..data.sources import load_source
    from ..evaluation import extract_features
    from .embeddings import write

    named = {key: values[key] for key in ("image_column", "label_column", "allow_outside_files")}
    source = load_source(spec, values["split"], **named)
    columns = _listed(values["columns"])
    known = source.dataset.column_names or []
    for column in columns:
        if known and column not in known:
            near = nearest(column, known)
            raise CommandError(f"{spec} has no column {column!r}{f'; the nearest is {near}' if near else ''}.")
    model, processor = open_model(name, values["device"])
    options = {key: values[key] for key in ("batch_size", "num_workers", "max_images", "device")}
    found = extract_features(model, source, processor, columns=columns, **options)
    write(output, found, source)
    left_out = f"; {len(found.skipped)} pictures could not be read" if found.skipped else ""
    say(f"{len(found):,} vectors of {found.embeddings.shape[1]} numbers in {output}{left_out}")
    return 0


def export(parsed: Parsed) -> int:
    """A checkpoint (or a run) as a folder that plain transformers loads."""
    path = existing(_one_word(parsed, "export", "RUN_OR_CHECKPOINT"), "export")
    output = Path(_required(parsed, "export", "output", "my-model")).expanduser()
    if (output / "config.json").exists() and not parsed.values.get("overwrite"):
        raise CommandError(f"export: {output} holds a model already; --overwrite replaces it.")
    quiet()
    from ..hub import export as write_export
    from ..hub import load_method

    model, processor = load_method(path)
    write_export(model, processor, output, read_run(path))
    say(f"model      {output}", *loading_lines(output))
    return 0


def report(parsed: Parsed) -> int:
    """report.html of a run."""
    folder = existing(_one_word(parsed, "report", "RUN folder"), "report")
    values = _with_defaults(parsed, REPORT)
    quiet()
    from ..evaluation.report import write_report

    say(f"report     {write_report(folder, dataset=values['dataset'], max_images=values['max_images'])}")
    return 0


def loading_lines(folder: Path) -> list[str]:
    """The code that loads an export without hf_ssl."""
    return [
        "",
        "    from transformers import AutoImageProcessor, AutoModel",
        f'    processor = AutoImageProcessor.from_pretrained("{folder}")',
        f'    model = AutoModel.from_pretrained("{folder}")',
    ]


def check_model(name: str, command: str) -> None:
    """Refuse what looks like a path and is none, before torch is imported."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CommandError(f"{command}: {path} holds no model: there is no config.json in it.")
        existing(name, command)
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CommandError(f"{command}: there is no model folder {path}.")


def open_model(name: str, device: str | None) -> tuple[Any, Any]:
    """(model, processor) of a native folder or Hub id, or of one of our checkpoints: what that would export.

    Classifiers keep their head, image-text models their text tower.
    """
    from ..evaluation import load_native

    path = Path(name).expanduser()
    if path.is_dir():
        config = read_json(path / "config.json")
        if isinstance(config, dict) and str(config.get("model_type")).startswith("ssl_"):
            from ..hub import load_method

            method, processor = load_method(path)
            return method.export_backbone.eval(), processor.native_processor()
        name = str(path)
    return load_native(name, None, device)[:2]


def check_device(name: str | None) -> None:
    """Refuse a device that PyTorch does not know, or that this machine does not have."""
    import torch

    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no device {name!r}; give cpu, cuda, cuda:0, ... or mps.") from None
    if device.type == "cpu":
        return
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None or kind.type != device.type:
        raise CommandError(f"--device {name}: PyTorch finds no such device here; it finds {kind or 'cpu alone'}.")
    if (device.index or 0) >= torch.accelerator.device_count():
        raise CommandError(f"--device {name}: there are {torch.accelerator.device_count()} of them, counted from 0.")


def _with_defaults(parsed: Parsed, flags: tuple[Flag, ...]) -> dict[str, Any]:
    return {flag.name: parsed.values.get(flag.name, flag.default) for flag in flags}


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [item for item in value.split(",") if item] if isinstance(value, str) else [str(item) for item in value]


def _choices(value: Any, known: tuple[str, ...], flag: str) -> tuple[str, ...]:
    chosen = tuple(_listed(value))
    for item in chosen or ("",):
        if item not in known:
            near = nearest(item, known)
            hint = f"the nearest is {near}" if near else f"there are {', '.join(known)}"
            raise UsageError(f"evaluate: {flag} knows no {item!r}; {hint}.")
    return chosen


def _writable(path: str | None, flag: str) -> None:
    if path and not Path(path).expanduser().absolute().parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {Path(path).expanduser().absolute().parent}.")
