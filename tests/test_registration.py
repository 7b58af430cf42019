"""The Auto classes know every method after ``import hf_ssl``, and import one only when it is needed."""

import importlib
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from transformers import (
    CONFIG_MAPPING,
    IMAGE_PROCESSOR_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
)

import hf_ssl
from hf_ssl.methods import METHODS, load
from hf_ssl.registration import _AfterImport, _stand_in, register
from tests import PATIENCE
from tests.contract.tiny import build, processor

ROOT = Path(__file__).parents[1]
FIRST = {
    "hf_ssl first": "import hf_ssl, transformers",
    "transformers first": "from transformers import AutoImageProcessor\nimport hf_ssl",
}
OPEN = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

if first == "hf_ssl first":
    from transformers import AutoConfig, AutoModel, AutoModelForPreTraining
    costly = {"transformers.modeling_utils", "transformers.models.auto.image_processing_auto", "hf_ssl.modeling"}
    assert not costly & set(sys.modules), "the first Auto class costs what it costs without hf_ssl"
together = Barrier(4)

def loaded(kind):
    together.wait()
    import transformers
    return getattr(transformers, kind).from_pretrained(folder)

kinds = ("AutoConfig", "AutoModel", "AutoModelForPreTraining", "AutoImageProcessor")
with ThreadPoolExecutor(4) as pool:
    found = [type(one) for one in pool.map(loaded, kinds)]
assert not {"hf_ssl.methods.joint_embedding.simclr", "hf_ssl.methods.image_text.clip"} & set(sys.modules)
assert found == [hf_ssl.DINOConfig, hf_ssl.DINOForPreTraining, hf_ssl.DINOForPreTraining, hf_ssl.DINOImageProcessor]
"""


@pytest.mark.parametrize("first", FIRST)
def test_threads_open_a_method_whatever_was_imported_first(first: str, tmp_path: Path) -> None:
    build("dino").save_pretrained(tmp_path)
    processor("dino").save_pretrained(tmp_path)
    code = f"first, folder = {first!r}, {str(tmp_path)!r}\n{FIRST[first]}\n{OPEN}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", METHODS)
def test_an_imported_method_has_no_stand_in(name: str) -> None:
    model = load(name)
    register()  # again: nothing happens
    config = CONFIG_MAPPING[f"ssl_{name}"]
    assert config is model.config_class is getattr(hf_ssl, f"{METHODS[name][1]}Config")
    assert AutoModel._model_mapping[config] is AutoModelForPreTraining._model_mapping[config] is model
    assert model.processor_class is getattr(hf_ssl, f"{METHODS[name][1]}ImageProcessor")
    for key in (config, f"ssl_{name}"):
        assert IMAGE_PROCESSOR_MAPPING[key] == {"pil": model.processor_class}
    assert type(AutoConfig.for_model(f"ssl_{name}")) is config


def test_a_stand_in_imports_when_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssl_test_method.py").write_text(
        "class Real:\n    size = 3\n    def __init__(self, side=1): self.side = side\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stand_in = pickle.loads(pickle.dumps({"pil": _stand_in("ssl_test_method", "Real")}))["pil"]
    assert (stand_in.__module__, stand_in.__name__) == ("ssl_test_method", "Real") and isinstance(stand_in, type)
    assert "ssl_test_method" not in sys.modules
    assert stand_in.size == 3 and stand_in(side=2).side == 2
    assert type(stand_in()) is sys.modules["ssl_test_method"].Real
    with pytest.raises(AttributeError, match="'Real' has no attribute 'colour'"):
        stand_in.colour  # noqa: B018


def test_the_hook_hears_of_its_modules_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip file's modules share one loader."""
    with zipfile.ZipFile(tmp_path / "modules.zip", "w") as file:
        for name in ("ssl_test_heard", "ssl_test_unheard"):
            file.writestr(f"{name}.py", "value = 1")
    monkeypatch.syspath_prepend(tmp_path / "modules.zip")
    heard: list[ModuleType] = []
    monkeypatch.setattr(sys, "meta_path", [_AfterImport({"ssl_test_heard": heard.append}), *sys.meta_path])
    modules = [importlib.import_module(name) for name in ("ssl_test_heard", "ssl_test_unheard")]
    assert heard == modules[:1] and heard[0].value == 1
