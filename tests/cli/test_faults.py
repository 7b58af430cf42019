"""Wrong command lines end in one sentence, whichever library below refuses; mistakes of ours keep their traceback."""

import errno
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from hf_ssl.cli import faults, main
from hf_ssl.files import WriteError


@pytest.fixture(autouse=True)
def _no_traceback(monkeypatch):
    monkeypatch.delenv("HF_SSL_DEBUG", raising=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """pics/ with two classes, good/ with a tiny ViT, and copies of it that are broken in one thing each."""
    root, rng = tmp_path_factory.mktemp("faults"), np.random.default_rng(0)
    for i in range(12):
        (root / "pics" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pics" / "ab"[i % 2] / f"{i}.png")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = ViTModel(config)
    for name in ("good", "shape", "act", "quant", "dtype", "bare"):
        model.save_pretrained(root / name)
        if name != "bare":
            ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / name)
    for name, field, value in (
        ("shape", "hidden_size", 32), ("act", "hidden_act", "nope"), ("dtype", "dtype", "float7"),
        ("quant", "quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ):  # fmt: skip
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps({**config, field: value}))
    (root / "file.txt").write_text("hello")
    return root


TRAIN = ["--dataset", "pics", "--output_dir", "out", "--overwrite", "--max_steps", "1", "--image_size", "16"]
TRAIN += ["--backbone", "resnet-pico", "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm"]
TRAIN += ["--dataloader_num_workers", "0", "--no_evaluation", "--no_report"]
WRONG = [  # (command line, words of its sentence)
    (["train", "--report_to", "wandb"], "--report_to wandb needs a package that is not installed: pip install wandb."),
    (["train", "--report_to", "tensorboard"], "pip install tensorboard."),
    (["train", "--report_to", "mlflow,comet_ml"], "pip install mlflow."),
    (["train", "--report_to", "nosuch"], "nosuch"),
    (["train", "--optim", "adamw_8bit"], "bitsandbytes"),
    (["train", "--optim", "galore_adamw"], "galore_torch"),
    (["train", "--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"nope": 3}'], "keyword argument 'nope'"),
    (["train", "--fp16"], "fp16 needs a GPU"),
    (["train", "--bf16", "--fp16"], "give bf16 or fp16, not both."),
    (["train", "--deepspeed", "x.json"], "pip install 'deepspeed"),
    (["train", "--accelerator_config", '{"no_such": 1}'], "no_such"),
    (["train", "--use_liger_kernel"], "liger-kernel"),
    (["train", "--num_channels", "5"], "num_channels is 5, and the images of pics have 3"),
    (
        ["train", "--projection_dim", "1000000000"],
        "does not fit into the memory; its largest numbers are projection_dim",
    ),
    (["train", "--backbone", "shape"], "the weights have other shapes than its config.json says"),
    (["train", "--backbone", "vit-nnao"], "The nearest preset is vit-nano."),
    (["train", "--backbone", "./godo"], "There is no folder './godo' (the nearest is good)."),
    (["train", "--backbone", "vit-pico", "--attn_implementation", "flash_attention_2"], "FlashAttention2"),
    (["train", "--backbone", "vit-pico", "--attn_implementation", "a/b"], "never runs"),
    (["train", "--image_mean", ".5,.5"], "image_mean has 2 values for 3 channels"),
    (["train", "--output_dir", "file.txt/sub"], "file.txt"),
    (["evaluate", "act"], "act cannot be loaded"),
    (["evaluate", "quant"], "bitsandbytes"),
    (["evaluate", "dtype"], "dtype cannot be loaded"),
    (["evaluate", "bare"], "preprocessor_config.json"),
    (["evaluate", "good", "--device", "nope"], "there is no device 'nope'"),
    (["evaluate", "good", "--device", "cuda:99"], "--device cuda:99: "),
    (["evaluate", "good", "--device", "meta"], "--device meta: "),
    (["embed", "good", "--output", "/proc/x.safetensors"], "I/O error"),
    (["embed", "good", "--output", "x.npz", "--split", "nope"], "no split 'nope'"),
    (["export", "good", "--output", "e"], "holds no hf_ssl method"),
    (["report", "file.txt"], "there is no folder file.txt"),
]


@pytest.mark.parametrize(("argv", "words"), WRONG, ids=[" ".join(argv)[:60] for argv, _ in WRONG])
def test_a_wrong_command_line_is_one_sentence(argv, words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if argv[0] == "train":
        argv = ["train", "simclr", *TRAIN, *argv[1:]]
    elif argv[0] in ("evaluate", "embed"):
        argv = [*argv, "--dataset", "pics"]
    assert main(argv) in (1, 2)
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert last.startswith("hf-ssl: ") and words in last and "Traceback" not in said, said


def raised(error, home=None):
    """``error`` with a traceback that ends in a module of the package ``home``."""
    if home is None:
        return error
    space = {"__name__": f"{home}.somewhere", "error": error}
    try:
        exec(compile("def fail():\n    raise error\nfail()", "x", "exec"), space)
    except BaseException as caught:
        return caught


def test_which_errors_are_whose():
    for error, words in (
        (OSError(errno.ENOSPC, "No space left on device", "x"), "The disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "The disk is full"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "The disk is full"),
        (MemoryError(), "The memory is full"),
        (
            raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "torch"),
            "The memory is full",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), "x/y: Permission denied."),
        (raised(ModuleNotFoundError("No module named 'peft'", name="peft"), "hf_ssl"), "pip install peft."),
        (
            importlib.metadata.PackageNotFoundError("The 'deepspeed>=0.9' distribution"),
            "pip install 'deepspeed>=0.9'.",
        ),
        (raised(ImportError("You need `x`"), "transformers"), "You need `x`."),
        (
            raised(RuntimeError("Unrecognized mode=nope"), "torch"),
            "torch refuses: Unrecognized mode=nope. HF_SSL_DEBUG=1",
        ),
        (raised(TypeError("f() got an unexpected keyword argument 'a'"), "accelerate"), "accelerate refuses"),
        (raised(KeyError("the metric x is not found"), "transformers"), "the metric x is not found"),
        (ValueError("Caught ValueError in worker.\nOriginal Traceback (most ...\nValueError: it is odd"), "it is odd"),
    ):
        assert faults.sentence(error).startswith(words) or words in faults.sentence(error), error
    for error in (
        raised(RuntimeError("a mistake"), "hf_ssl"), raised(KeyError("x"), "torch"),
        raised(AttributeError("x"), "torch"),
        raised(TypeError("unsupported operand"), "torch"), raised(AssertionError(), "hf_ssl"), IndexError("x"),
        raised(ImportError("cannot import name 'x'"), "hf_ssl"),
        raised(ModuleNotFoundError("No module named 'hf_ssl.x'", name="hf_ssl.x"), "hf_ssl"),
    ):  # fmt: skip
        assert faults.sentence(error) is None, error
    full = WriteError(Path("x"), OSError(errno.ENOSPC, "No space left on device"))
    assert faults.sentence(full) == str(full)  # not a sentence about a sentence


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("hf_ssl.cli.commands.check_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["evaluate", "m", "--dataset", "emoji"])


def test_embed_writes_names_and_paths_that_move_with_the_data(place, monkeypatch, tmp_path, capsys):
    import csv

    import pyarrow.parquet as pq

    monkeypatch.chdir(place)
    for output in ("f.csv", "f.parquet"):
        assert (
            main(["embed", "good", "--dataset", "pics", "--output", str(tmp_path / output), "--batch_size", "5"]) == 0
        )
    table = pq.read_table(tmp_path / "f.parquet").to_pydict()
    with (tmp_path / "f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "label_name", "path", *(f"e{i}" for i in range(16))] and len(rows) == 12
    for row, label, name, path, vector in zip(
        rows, table["label"], table["label_name"], table["path"], table["embedding"], strict=True
    ):
        assert (row["label"], row["label_name"], row["path"]) == (str(label), name, path)
        assert name == "ab"[label] and path.startswith(f"{name}/") and (place / "pics" / path).is_file()
        assert np.array_equal(np.float32([row[f"e{i}"] for i in range(16)]), np.float32(vector))
