"""What a run's numbers depend on, as every checkpoint keeps it, and what may have changed when a run goes on.

The settings are read off the dataclasses, the config and the processor: whatever they hold is compared, except what is
named here as harmless. So a new argument is compared until it is listed here.
"""

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.shards import table_rows
from ..data.sources import ImageSource
from ..hub import scrub
from ..methods import name_of
from ..spelling import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..processing import SSLImageProcessor
    from .trainer import SSLTrainer

Facts = dict[str, dict[str, Any]]  # group -> name -> value of JSON's types

# Training arguments that no number of the training depends on, by how their names begin.
HARMLESS = (
    "output_dir", "allow_changed", "resume_from_checkpoint", "logging_", "log_", "disable_tqdm", "report_to",
    "run_name", "project", "trackio_", "eval_", "per_device_eval_", "prediction_loss_only", "include_for_metrics",
    "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "save_", "enable_jit_checkpoint", "push_to_hub", "hub_",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "restore_callback_states",
    "do_train", "do_eval", "do_predict", "debug", "skip_memory_metrics", "local_rank", "max_bad_fraction",
    "nonfinite_steps", "health_steps", "include_num_input_tokens_seen", "use_cache", "torch_empty_cache_steps",
    "ddp_timeout",
    "average_tokens_across_devices", "accelerator_config", "dataloader_", "remove_unused_columns", "label_names",
    "length_column_name", "train_sampling_strategy", "activation_checkpointing", "gradient_checkpointing",
)  # fmt: skip
# Training arguments that another fact stands for: what they come to is compared, not how it was asked for.
_RESOLVED = (
    "max_steps", "num_train_epochs",  # the run's length: see ``trainer``, which knows it in steps
    "base_learning_rate",  # learning_rate
    "precision", "bf16", "fp16",  # run.precision: settled when training starts
    "use_cpu",  # run.device
)  # fmt: skip
_CONFIG_HARMLESS = {
    "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "label2id",
    "output_hidden_states", "output_attentions", "return_dict", "use_cache", "chunk_size_feed_forward",
    "is_encoder_decoder", "problem_type",
}  # fmt: skip
# Fields of a source that another fact stands for, that differ between machines, or that only serve messages.
_SOURCE_HARMLESS = {"name", "dataset", "labels", "shards", "part", "missing", "home", "said", "outside"}
# Where these differ the run goes on soundly, but not bit for bit.
_SOUND = {
    "device", "torch", "transformers", "attention", "start", "ignore_data_skip", "tf32", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_static_graph", "ddp_backend", "full_determinism",
}  # fmt: skip
_SAMPLE = 16  # rows of the training set that are held against the checkpoint's
_SHOWN = 3  # differences of one part that are written out


# --- the facts -------------------------------------------------------------------------------------------------------


def facts(trainer: "SSLTrainer") -> Facts:
    """What the numbers of ``trainer``'s run depend on, once its precision is settled."""
    method, args = trainer.method, trainer.args
    source, streams = trainer.train_source, trainer.train_source.is_stream
    choice = trainer.precision
    found = {
        "method": config_facts(method.config),
        "views": view_facts(trainer.views),
        "training": argument_facts(args),
        "data": {
            **{f"dataset.{name}": value for name, value in source_facts(source).items()},
            "unlabeled_ratio": None if trainer.labeled is None else trainer.labeled.unlabeled_ratio,
            # a stream's order depends on who reads it and on how much is held; any row can be asked of other sources
            "shuffle_buffer": trainer.shuffle_buffer if streams else None,
            "dataloader_num_workers": args.dataloader_num_workers if streams else None,
        },
        "run": {
            "world_size": args.world_size,
            "precision": None if choice is None else choice.precision,
            "attention": method.backbone.config._attn_implementation,
            "start": method.backbone.config.name_or_path or None,
            "device": args.device.type,
            **{name: metadata.version(name).partition("+")[0] for name in ("torch", "transformers")},
        },
    }
    plain: Facts = json.loads(json.dumps(scrub(found), default=str))
    return plain


def config_facts(config: "PreTrainedConfig") -> dict[str, Any]:
    """The method's config, the backbone's under ``backbone.``."""
    named = {name.replace("backbone_config", "backbone"): value for name, value in _flat(config.to_dict()).items()}
    return {name: value for name, value in named.items() if not _CONFIG_HARMLESS & set(name.split("."))}


def view_facts(processor: "SSLImageProcessor") -> dict[str, Any]:
    """The view recipe; of a tokenizer its checksum."""
    given = processor.to_dict()
    size = given.pop("size")
    square = isinstance(size, dict) and size.get("height") == size.get("width")
    flat = {**_flat(given), "image_size": size["height"] if square else size}
    if (tokenizer := getattr(processor, "_tokenizer", None)) is not None:
        flat["tokenizer"] = zlib.crc32(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return flat


def argument_facts(args: Any) -> dict[str, Any]:
    """Every one of ``SSLTrainingArguments`` that is not harmless, under the names that the user gave."""
    given = {**args.to_dict(), **args.asked}
    given["optim"] = str(given["optim"]).removesuffix("_fused")  # the same optimiser, where torch has it
    return {name: value for name, value in given.items() if not name.startswith(HARMLESS) and name not in _RESOLVED}


def source_facts(source: ImageSource) -> dict[str, Any]:
    """Which images and how they are read, as far as it can be told cheaply and on another machine as well."""
    own = (field.name for field in fields(source) if field.name not in _SOURCE_HARMLESS)
    return {
        "name": source.name if not _is_local(source.name) else Path(source.name).name,
        "rows": source.num_rows,
        "content": None if source.is_stream else _content(source, source.caption_columns),
        "streaming": source.is_stream,
        "shards": source.shards.count if source.is_stream else None,
        **{name: _named(getattr(source, name)) for name in own},
    }


def _named(value: Any) -> Any:
    """A plain value as it is, a function by its name, another object by its class."""
    if value is None or isinstance(value, (str, int, float, tuple, list)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _is_local(name: str) -> bool:
    return os.path.isabs(os.path.expanduser(name)) or os.path.exists(name)


def _content(source: ImageSource, columns: Iterable[str]) -> int:
    """A checksum of rows all over the set: their texts, and the bytes of their images, or name and size of a file."""
    last = len(source.dataset) - 1
    places = sorted({round(i * last / (_SAMPLE - 1)) for i in range(_SAMPLE)}) if last >= 0 else []
    dataset: Any = source.dataset.select_columns(["image", *columns]).with_format("arrow")
    total = 0
    for row in table_rows(dataset[places]) if places else ():
        image = row.pop("image")
        for part in (_image_bytes(image), json.dumps(row, sort_keys=True, default=str).encode()):
            total = zlib.crc32(part, total)
    return total


def _image_bytes(image: Any) -> Any:
    if isinstance(image, dict) and image.get("bytes") is not None:
        return image["bytes"]
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str):
        return image.tobytes() if hasattr(image, "tobytes") else str(image).encode()
    size = os.path.getsize(path) if os.path.exists(path) else -1
    return f"{os.path.basename(path)} {size}".encode(errors="surrogateescape")


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; a list of dicts by number: {"views[0].scale": ...}."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for i, item in enumerate(value):
                flat |= _flat(item, f"{prefix}{name}[{i}].")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


# --- comparing -------------------------------------------------------------------------------------------------------


@dataclass
class Differences:
    """What a run and its checkpoint differ in, name -> (value in the checkpoint, value here).

    refused: the numbers would be others; allowed: they are, as the user wishes; sound: the run goes on as well,
    not bit for bit. told: a line each for the user.
    """

    refused: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    allowed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    sound: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


def compare(before: Facts, now: Facts, allowed: Iterable[str] = ()) -> Differences:
    """The differences of a checkpoint's facts and a run's; a fact that only one of them holds is ignored."""
    found, allowed, sound = Differences(), set(allowed), set(_SOUND)
    if _batch(before) == _batch(now) and not now.get("data", {}).get("dataset.streaming"):
        sound |= {"world_size", "per_device_train_batch_size"}
    if _same_rows(before) == _same_rows(now) != ():
        sound.add("dataset.name")  # the folder was moved or renamed
    for group, values in now.items():
        earlier = before.get(group, {})
        for name in (name for name in values if name in earlier and values[name] != earlier[name]):
            is_allowed = bool({name, part(name), group} & allowed)
            kind = found.sound if name in sound else found.allowed if is_allowed else found.refused
            kind[name] = (earlier[name], values[name])
    return found


def _same_rows(facts: Facts) -> tuple[Any, ...]:
    data = facts.get("data", {})
    content = data.get("dataset.content")
    return () if content is None else (content, data.get("dataset.rows"))


def _batch(facts: Facts) -> int:
    """Images of one pass over all processes."""
    size = facts.get("training", {}).get("per_device_train_batch_size") or 0
    return size * (facts.get("run", {}).get("world_size") or 1)


def part(name: str) -> str:
    """What a fact belongs to: backbone of backbone.hidden_size, views of views[0].scale, dataset of dataset.rows."""
    return name.partition(".")[0].partition("[")[0]


def check(
    checkpoint: str, before: Facts, now: Facts, allowed: Iterable[str] = (), misfit: str | None = None
) -> Differences:
    """What differs where a run goes on from ``checkpoint``. ValueError: it must not go on, and why.

    misfit: a weight that has another shape now, in words: then no difference can be allowed.
    """
    allowed = tuple(allowed)
    _check_names(allowed, now)
    _check_method(checkpoint, before, now)
    where, found = Path(checkpoint).name, compare(before, now, allowed)
    if misfit and (changed := {**found.refused, **found.allowed}):
        raise ValueError(
            f"{checkpoint} was trained with other settings: {_listed(changed)}. Its weights do not fit ({misfit}): "
            "give the old values, or start a new run in another output_dir"
        )
    if found.refused:
        names = ",".join(dict.fromkeys(_typed(name) for name in found.refused))
        raise ValueError(
            f"{checkpoint} was trained with other settings: {_listed(found.refused)}. Give the old values, or "
            f"--allow_changed {names} (allow_changed=... in Python) to go on with the new ones"
        )
    if found.allowed:
        found.told.append(
            f"Changed since {where}, as allowed: {_listed(found.allowed)}. From here on its numbers are not those of "
            "a run that never stopped."
        )
    if found.sound:
        found.told.append(
            f"Changed since {where}: {_listed(found.sound)}. The run goes on, but not bit for bit as if it had never "
            "stopped."
        )
    return found


def _check_names(allowed: Iterable[str], now: Facts) -> None:
    """ValueError for a name in ``allow_changed`` that nothing has."""
    names = {known for group, values in now.items() for name in values for known in (group, name, part(name))}
    for name in allowed:
        if name not in names and name not in _RESOLVED and not name.startswith(HARMLESS):
            near = nearest(name, sorted(names))
            hint = f"; the nearest is {near}" if near else ""
            raise ValueError(f"allow_changed names {name!r}, which no run depends on{hint}")


def _check_method(checkpoint: str, before: Facts, now: Facts) -> None:
    theirs, mine = (name_of(str(facts.get("method", {}).get("model_type", ""))) for facts in (before, now))
    if theirs != mine:
        raise ValueError(
            f"{checkpoint} was trained with {theirs}, and {mine} cannot go on with it: start a new run in another "
            f"output_dir; --backbone {checkpoint} starts it from this backbone's weights"
        )


def _typed(name: str) -> str:
    """The name to allow a change by: the part where there are several of it."""
    return part(name) if part(name) in ("backbone", "views", "dataset") else name


def _listed(changes: dict[str, tuple[Any, Any]]) -> str:
    """In words; of one part no more than a few."""
    if "backbone.model_type" in changes:
        changes = {
            name: pair for name, pair in changes.items() if part(name) != "backbone" or name == "backbone.model_type"
        }
    parts: dict[str, list[str]] = {}
    for name, pair in changes.items():
        parts.setdefault(_typed(name), []).append(_words(name, *pair))
    shown = []
    for words in parts.values():
        more = len(words) - _SHOWN
        shown += words[:_SHOWN] if more > 1 else words
        if more > 1:
            shown.append(f"and {more} more of it")
    return "; ".join(shown)


def _words(name: str, then: Any, now: Any) -> str:
    if name == "dataset.content":
        return f"dataset: rows that both have, {_SAMPLE} of them compared, hold other images or texts"
    if name == "tokenizer":
        return "tokenizer: another vocabulary"
    return f"{name.removesuffix('.model_type')} {_value(then)} in the checkpoint and {_value(now)} here"


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if value is not None else "none"
    return text if len(text) <= 60 else f"{text[:57]}..."
