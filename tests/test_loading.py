"""Models are loaded in one place, which runs no code of theirs and says in a sentence why one does not load."""

import ast
import io
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

import hf_ssl
from hf_ssl.cli import main
from hf_ssl.loading import LoadError, from_config, load_pretrained
from hf_ssl.training.build import build_method

PACKAGE = Path(hf_ssl.__file__).parent
AUTO = (
    "AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoModelForPreTraining", "AutoImageProcessor",
    "AutoProcessor", "AutoTokenizer", "AutoFeatureExtractor",
)  # fmt: skip
FORBIDDEN = {  # name of a call -> the files that may make it
    "from_pretrained": {"loading.py"}, "from_config": {"loading.py"}, "eval": set(), "exec": set(), "input": set(),
    "get_class_from_dynamic_module": set(), "unsafe_load": set(), "full_load": set(),
}  # fmt: skip


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """(name, call) of every call, and of every bound method that is handed over instead of called."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            on_super = isinstance(owner, ast.Call) and getattr(owner.func, "id", "") == "super"
            if isinstance(node.func, ast.Name):
                found.append((node.func.id, node))
            elif isinstance(node.func, ast.Attribute) and not on_super:  # a class that says what it is runs no code
                found.append((f".{node.func.attr}", node))
            found += [(f".{part.attr}", node) for part in node.args if isinstance(part, ast.Attribute)]
    return found


def broken_rules(file: Path) -> list[str]:
    tree, bad = ast.parse(file.read_text()), []
    for name, call in calls(tree):
        word = name.removeprefix(".")
        method_only = word in ("from_pretrained", "from_config")  # loading.from_config itself is a plain function
        if word in FORBIDDEN and name.startswith(".") == method_only and file.name not in FORBIDDEN[word]:
            bad.append(f"{file}:{call.lineno} calls {word}")
        trusts = [key for key in call.keywords if key.arg == "trust_remote_code"]
        bad += [f"{file}:{call.lineno} trusts" for key in trusts if getattr(key.value, "value", True) is not False]
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return bad + [f"{file} imports {name}" for name in imported & {"pickle", "dill", "joblib", "cloudpickle"}]


def test_nothing_but_loading_opens_a_model():
    files = [*PACKAGE.rglob("*.py")]
    assert [rule for file in files for rule in broken_rules(file)] == []


def test_the_examples_trust_no_code_either():
    for file in (PACKAGE.parent / "recipes" / "finetune").glob("*.py"):
        for name, call in calls(ast.parse(file.read_text())):
            if name in (".from_pretrained", "pipeline"):
                assert any(key.arg == "trust_remote_code" for key in call.keywords), f"{file}:{call.lineno}"


def test_the_walk_notices(tmp_path):
    (tmp_path / "bad.py").write_text(
        "import pickle\nfrom functools import partial\nmodel = AutoModel.from_pretrained('x')\n"
        "make = partial(AutoModel.from_config, config)\nload(where, trust_remote_code=True)\neval('1')\nmodel.eval()\n"
    )
    assert len(broken_rules(tmp_path / "bad.py")) == 5


# --- code that comes with a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> dict[str, Path]:
    """Folders that ask for code of their own, in every file that can ask."""
    root, found = tmp_path_factory.mktemp("hostile"), {}
    auto = {name: "other.Thing" for name in AUTO} | {"AutoTokenizer": ["other.Thing", "other.Thing"]}
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for name, config in {
        "unknown": {"model_type": "other", "architectures": ["Thing"]},
        "known": {"model_type": "vit", "architectures": ["ViTModel"], **small},
        "image_text": {"model_type": "clip", "architectures": ["CLIPModel"]},
    }.items():
        found[name] = folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto}))
        processor = {"image_processor_type": "ThingImageProcessor", "auto_map": auto}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Thing", "auto_map": auto}))
        (folder / "other.py").write_text("import pathlib\npathlib.Path('executed').touch()\nclass Thing: ...\n")
        torch.manual_seed(0)
        if name != "image_text":
            save_file(ViTModel(ViTConfig(**small)).state_dict(), folder / "model.safetensors", {"format": "pt"})
    return found


@pytest.fixture
def eager(tmp_path, monkeypatch):
    """A standard input that agrees to everything, and a working directory where executed code leaves a file."""
    answers = io.StringIO("y\n" * 1000)
    monkeypatch.setattr("sys.stdin", answers)
    monkeypatch.chdir(tmp_path)
    yield
    assert answers.tell() == 0, "somebody was asked"
    assert not (tmp_path / "executed").exists()


def test_no_loader_runs_the_code_of_a_folder(hostile, eager):
    for name, folder in hostile.items():
        for auto in (*AUTO, "CLIPProcessor", "VisionTextDualEncoderProcessor", "ViTModel"):
            try:
                load_pretrained(getattr(transformers, auto), folder, trust_remote_code=True)
            except LoadError as error:
                assert name in str(error) and str(error).endswith(".")
    config = load_pretrained(transformers.AutoConfig, hostile["known"])
    assert from_config(transformers.AutoModel, config).config.auto_map  # the native class does as well


def test_no_command_runs_the_code_of_a_folder(hostile, eager, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    for i in range(20):
        (pictures / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (10 * i, 0, 99)).save(pictures / f"{i % 2}" / f"{i}.png")
        (pictures / f"{i % 2}" / f"{i}.txt").write_text(f"picture {i}\n")
    unknown, run = str(hostile["unknown"]), str(tmp_path / "run")
    data = ["--dataset", str(pictures)]
    short = [*data, "--output_dir", run, "--max_steps", "1", "--image_size", "32", "--overwrite"]
    commands = [
        ["train", "simclr", "--backbone", unknown, *short],
        ["train", "fixmatch", "--backbone", unknown, *short],
        ["train", "clip", "--backbone", unknown, *short],
        ["train", "clip", "--text_backbone", unknown, *short],
        ["train", "clip", "--tokenizer", unknown, *short],
        ["evaluate", unknown, *data],
        ["embed", unknown, *data, "--output", "f.npz"],
        ["pseudo-label", unknown, *data, "--output", "f.parquet"],
        ["export", unknown, "--output", "e"],
        ["publish", unknown, "me/it"],
        ["convert", f"{unknown}/other.py", "--output", "c"],
        ["report", unknown, *data],
    ]
    for command in commands:
        assert main(command) in (1, 2) or command[0] == "report", command  # a report leaves out what does not load
        said = capsys.readouterr().err
        assert "Traceback" not in said, said
        if command[0] in ("train", "evaluate", "embed", "pseudo-label") and "--tokenizer" not in command:
            assert "never runs the code of a model" in said, (command, said)
    with pytest.raises(ValueError, match="never runs the code"):
        hf_ssl.fit(unknown, str(pictures), image_size=32)
    with pytest.raises(ValueError, match="never runs the code"):
        from hf_ssl.training.arguments import ModelArguments

        build_method("simclr", hf_ssl.load_source(str(pictures)), ModelArguments(backbone=unknown, image_size=32))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "vit", "attn_implementation": "someone/kernel"},
        {
            "model_type": "timm_wrapper",
            "num_classes": 9,
            "architecture": "resnet18",
            "model_args": {"checkpoint_path": "x"},
        },
    ],
)
def test_a_config_fetches_nothing(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for auto in (transformers.AutoConfig, transformers.AutoModel):
        with pytest.raises(LoadError, match=r"never runs|other weights"):
            load_pretrained(auto, tmp_path)


# --- sentences ------------------------------------------------------------------------------------------------------


def small_model(folder: Path) -> Path:
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ViTModel(config).save_pretrained(folder)
    return folder


class _Runs:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_weights_that_could_run_code_or_are_damaged_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = small_model(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:100], whole[: len(whole) // 2], b"", b"x" * 5000):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(LoadError, match="damaged or cut short"):
            load_pretrained(transformers.AutoModel, folder)
    (folder / "model.safetensors").unlink()
    for protocol in (2, 4):
        torch.save({"a": _Runs()}, folder / "pytorch_model.bin", pickle_protocol=protocol)
        with pytest.raises(LoadError, match="could run code"):
            load_pretrained(transformers.AutoModel, folder)
    assert not (tmp_path / "executed").exists()


def test_what_is_no_model_folder_is_named_with_the_nearest(tmp_path):
    folder = small_model(tmp_path / "model")
    with pytest.raises(LoadError, match=rf"There is no folder .*modle.* \(the nearest is {folder}\)\.$"):
        load_pretrained(transformers.AutoModel, tmp_path / "modle")
    with pytest.raises(LoadError, match="is a file, and a model is a folder"):
        load_pretrained(transformers.AutoModel, folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(LoadError, match=r"config\.json"):
        load_pretrained(transformers.AutoModel, folder)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match=r"no config\.json"):
        load_pretrained(transformers.AutoModel, empty)
    with pytest.raises(LoadError, match=r"HF_HUB_OFFLINE"):
        load_pretrained(transformers.AutoModel, "nobody/nothing")
    with pytest.raises(LoadError, match=r"preprocessor_config\.json"):
        load_pretrained(transformers.AutoImageProcessor, small_model(tmp_path / "bare"))
