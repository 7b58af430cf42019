"""Where a published repo keeps the method: its root is a native model, ``ssl/`` is the method with its processor."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

FOLDER = "ssl"
_HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def method_folder(where: Any, options: Mapping[str, Any]) -> str | None:
    """The subfolder of a folder or Hub repo that holds a method: "" the root itself, "ssl", or None for neither.

    options: what ``from_pretrained`` was given; revision, token and the like are used. OSError: there is no such repo.
    """
    hub = {name: value for name, value in options.items() if name in _HUB_OPTIONS}
    if _is_method(PreTrainedConfig.get_config_dict(where, **hub)[0]):
        return ""
    try:
        inner = PreTrainedConfig.get_config_dict(where, subfolder=FOLDER, **hub)[0]
    except OSError:
        return None
    return FOLDER if _is_method(inner) else None


def _is_method(config: dict[str, Any]) -> bool:
    return str(config.get("model_type", "")).startswith("ssl_")
