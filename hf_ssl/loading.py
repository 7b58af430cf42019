"""The one way from a folder or a Hub id to something of transformers. Code that lies there is never run.

Every ``from_pretrained`` and ``from_config`` of an Auto class goes through here (a test walks the source).
transformers asks on standard input whether it may run a repo's own code; here the answer is no before it can ask.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .spelling import nearest_path

_OF_A_REPO = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
_TIMM_LOADS = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".safetensors")


class LoadError(ValueError):
    """A folder or Hub id that cannot be loaded; one sentence that says why and what to do."""


def load_pretrained(loader: Any, where: str | Path, **options: Any) -> Any:
    """``loader.from_pretrained(where, **options)``, without any code of ``where``. Raises LoadError.

    loader: an Auto class or a model class. options: as ``from_pretrained`` takes them; ``trust_remote_code`` is False
    whatever they say.
    """
    options.pop("trust_remote_code", None)
    if loader.__module__.startswith("transformers.models.auto."):
        options["trust_remote_code"] = False
    where = str(where)
    place = Path(where, options.get("subfolder") or "").expanduser()
    if place.is_dir():
        where = str(Path(where).expanduser())
    if loader.__name__.startswith("AutoModel"):
        from transformers import AutoConfig

        load_pretrained(AutoConfig, where, **{name: options[name] for name in _OF_A_REPO if name in options})
    try:
        with _nothing_asked():
            loaded = loader.from_pretrained(where, **options)
    except LoadError:
        raise
    except Exception as error:
        if raised_in(error) == "hf_ssl":  # a sentence already, or a mistake of ours that keeps its traceback
            raise
        raise LoadError(_sentence(error, where, place)) from error
    if loader.__name__ == "AutoConfig":
        _check_config(loaded, where)
    return loaded


def from_config(auto: Any, config: Any, **options: Any) -> Any:
    """``auto.from_config(config, **options)``: random weights in a native class, never in one that a config brings."""
    _check_config(config, getattr(config, "name_or_path", "") or "the config")
    with _nothing_asked():
        return auto.from_config(config, **options, trust_remote_code=False)


@contextmanager
def _nothing_asked() -> Iterator[None]:
    """Parts of a processor are loaded by transformers itself, which does not pass ``trust_remote_code`` on."""
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # to wait for an answer: 0 means no
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def check_attention(name: Any, where: str | Path) -> None:
    """Refuse an attention implementation that is a Hub repo (user/kernel): transformers would run its code."""
    if "/" in str(name or ""):
        raise LoadError(
            f"{where}: the attention {name!r} is code of a Hub repo, which hf_ssl never runs; choose sdpa, eager or "
            "flash_attention_2."
        )


def _check_config(config: Any, where: str | Path) -> None:
    """Refuse what a config alone could fetch or unpickle: an attention kernel, a file that timm is to load."""
    check_attention(getattr(config, "_attn_implementation", None), where)
    asked = set(getattr(config, "model_args", None) or ()) & _TIMM_LOADS
    if asked:
        raise LoadError(
            f"{where}: its config makes timm load other weights ({', '.join(sorted(asked))}); remove them."
        )


def raised_in(error: BaseException) -> str:
    """The package whose code raised ``error``: "hf_ssl", "torch", "transformers", ...; "" where that is unknown."""
    trace, name = error.__traceback__, ""
    while trace is not None:
        found = str(trace.tb_frame.f_globals.get("__name__") or "").partition(".")[0]
        name = found if found not in ("importlib", "contextlib", "_frozen_importlib") else name
        trace = trace.tb_next
    return name


# --- what went wrong, in a sentence --------------------------------------------------------------------------------


def _sentence(error: Exception, where: str, place: Path) -> str:
    words = " ".join(str(error).split())
    if "trust_remote_code" in words or "custom code" in words:
        return (
            f"{where} asks to run code that comes with it, and hf_ssl never runs the code of a model: take one whose "
            "class is in transformers, or convert its weights with `hf-ssl convert`."
        )
    if place.is_file():
        made = "; `hf-ssl convert FILE --output DIR` makes one of it" if place.suffix in _WEIGHTS else ""
        return f"{where} is a file, and a model is a folder{made}."
    if not place.is_dir():
        return _not_here(error, where)
    kind = type(error).__name__
    if not (place / "config.json").is_file() and not list(place.glob("*.json")):
        return f"{where} holds no model: there is no config.json in it."
    if "UnpicklingError" in kind or "weights_only" in words or "torch.load" in words:
        return (
            f"The weights in {where} (pytorch_model.bin) are no plain tensors and could run code when they are read, "
            "so they were not read: ask for model.safetensors, or look at them with `hf-ssl convert`."
        )
    if "SafetensorError" in kind:
        return f"The weights in {where} are damaged or cut short: {words[:200].rstrip('.')}."
    if "ignore_mismatched_sizes" in words or "size mismatch" in words:
        return f"{where} cannot be loaded: the weights have other shapes than its config.json says."
    if "preprocessor_config.json" in words or "image processor" in words.lower():
        return (
            f"{where} holds no image processor (preprocessor_config.json), which says how pictures become numbers: "
            "copy the one of the model that it was made from."
        )
    return f"{where} cannot be loaded: {words[:400].rstrip('.') or kind}."


def _not_here(error: BaseException | None, where: str) -> str:
    """Of a name that is no folder: the nearest one, and why the Hub did not have it either."""
    near = nearest_path(Path(where).expanduser())
    here = f"There is no folder {where!r}{f' (the nearest is {near})' if near else ''}"
    if where.startswith((".", "/", "~")) or where.count("/") > 1:
        return f"{here}."
    return f"{here}, and as a Hub id {_hub_cause(error)}."


def _hub_cause(error: BaseException | None) -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    while error is not None:
        kind, code = type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
        if kind == "OfflineModeIsEnabled" or offline:
            return "it is not looked up, because HF_HUB_OFFLINE is set, and is not in the cache"
        if kind == "GatedRepoError":
            return f"it is gated: ask for access on its page, then `hf auth login` ({code})"
        if kind == "RepositoryNotFoundError":
            return f"it does not exist, or this token may not see it ({code})"
        if code is not None:
            return f"the Hub refuses it ({code})"
        error = error.__cause__ or error.__context__
    return "it cannot be reached or is none: check the name and the network"
