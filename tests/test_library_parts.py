"""The private parts of other libraries that hf_ssl touches: each exists, and none is touched that is not listed."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_ssl"
MODELS = "transformers.PreTrainedModel"
TRAINER = "transformers.Trainer"
# Private name -> where it lives and what hf_ssl needs it for.
PARTS = {
    "_attn_implementation": ("transformers.PreTrainedConfig", "which attention a backbone runs"),
    "_finish_current_push": (TRAINER, "overridden: waits for our own upload"),
    "_from_config": (MODELS, "the untrained twin of a native model"),
    "_init_training_state": (TRAINER, "where a resumed run's stream starts"),
    "_init_weights": (MODELS, "overridden: heads, queues and teachers"),
    "_issue_warnings_after_load": (TRAINER, "overridden: a checkpoint that does not fit is an error"),
    "_get_grad_norm": (TRAINER, "the norm of each step's gradient, which tells whether it is finite"),
    "_get_output_dir": (TRAINER, "where checkpoints lie"),
    "_load_from_checkpoint": (TRAINER, "overridden: weights that do not fit are told in a sentence"),
    "_load_optimizer_and_scheduler": (TRAINER, "overridden: settings that may change take effect"),
    "_prepare_input": (TRAINER, "overridden: copies pinned tensors asynchronously"),
    "_prepare_inputs": (TRAINER, "overridden: normalises the views on the device"),
    "_push_from_checkpoint": (TRAINER, "overridden: pushes a published repo"),
    "_save": (TRAINER, "overridden: no pickled arguments in a checkpoint"),
    "_save_checkpoint": (TRAINER, "overridden: a full disk leaves the earlier checkpoint"),
    "_save_rng_state": (TRAINER, "overridden: every process has written before the files are listed"),
    "_supports_attention_backend": (MODELS, "set: methods pass attention on to their backbone"),
    "_supports_flash_attn": (MODELS, "set: methods pass attention on to their backbone"),
    "_supports_flex_attn": (MODELS, "set: methods pass attention on to their backbone"),
    "_supports_sdpa": (MODELS, "set: methods pass attention on to their backbone"),
    "_apply": ("torch.nn.Module", "overridden: teachers and memories stay float32 when a model is cast"),
    "_BatchNorm": ("torch.nn.modules.batchnorm", "every BatchNorm, whatever its dimensions"),
    "_foreach_add_": ("torch", "one call for all parameters"),
    "_foreach_copy_": ("torch", "one call for all parameters"),
    "_foreach_lerp_": ("torch", "one call for all parameters"),
    "_foreach_mul_": ("torch", "one call for all parameters"),
    "_foreach_norm": ("torch", "one call for all parameters"),
    "_get_default_store": ("torch.distributed.distributed_c10d", "what processes tell each other outside collectives"),
    "_is_mkldnn_bf16_supported": ("torch.ops.mkldnn", "whether the CPU multiplies bf16"),
    "_load_from_state_dict": ("torch.nn.Module", "overridden: a memory of another size is refused"),
    "_shutdown_workers": ("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", "ends an epoch's workers"),
}  # fmt: skip
# The same for what only instances have.
ATTRIBUTES = {
    "_last_lr": ("torch.optim.lr_scheduler.LRScheduler", "the learning rate that is logged"),
    "_indices": ("datasets.Dataset", "the rows of a selection"),
    "_train_batch_size": (TRAINER, "images per process and micro-batch"),
}
STANDARD = {"_replace"}  # namedtuple's, documented
MODULES = ("transformers.models.vit.modeling_vit", "torch._dynamo.exc")  # no public interface


@pytest.mark.parametrize("name", PARTS)
def test_a_private_part_exists(name: str) -> None:
    home, purpose = PARTS[name]
    found = _find(home)
    if isinstance(found, type) and issubclass(found, _find("transformers.PreTrainedConfig")):
        found = found()
    assert hasattr(found, name), f"{home} has no {name} in this version, which hf_ssl needs ({purpose}): adapt it"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_private_attribute_is_set(name: str) -> None:
    home, purpose = ATTRIBUTES[name]
    sets = f"self.{name} =" in inspect.getsource(_find(home)).replace(f"self.{name}:", f"self.{name} =")
    assert sets, f"{home} sets no {name} in this version, which hf_ssl needs ({purpose}): adapt it"


def test_every_private_part_is_listed() -> None:
    """Private names that hf_ssl uses and does not define, or overrides in a class of another library."""
    used = {name for file in PACKAGE.rglob("*.py") for name in _foreign_names(file)}
    missing = used - set(PARTS) - set(ATTRIBUTES) - STANDARD
    assert not missing, f"hf_ssl touches {sorted(missing)} of another library: name them in PARTS"


def test_private_modules_are_listed() -> None:
    found = {
        node.module
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module
        if ".models." in node.module or "._" in node.module
        if not node.module.startswith("transformers.models.auto")
    }
    assert found <= set(MODULES), f"hf_ssl imports from {sorted(found - set(MODULES))}: name them in MODULES"


@cache
def _find(path: str) -> Any:
    """The module, class or operator namespace of a dotted path."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        return attrgetter(".".join(parts[cut:]))(module) if parts[cut:] else module
    raise ImportError(path)


def _foreign_names(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            through_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
            if through_super or node.attr not in _own_names():
                yield node.attr
        elif isinstance(node, ast.ClassDef):
            yield from _overridden(node)


def _overridden(node: ast.ClassDef) -> Iterator[str]:
    """Private names of a class body that a class of transformers or torch has as well."""
    bases = [_find(home) for home in (MODELS, TRAINER, "torch.nn.Module", "transformers.PreTrainedConfig")]
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement]
        for name in (getattr(target, "name", getattr(target, "id", "")) for target in targets):
            if _is_private(name) and any(hasattr(base, name) for base in bases):
                yield name


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def _own_names() -> set[str]:
    """Private names that hf_ssl defines or assigns itself."""
    found = set()
    for node in (node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found
