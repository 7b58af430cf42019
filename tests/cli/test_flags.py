"""Flags: read from the source without importing it, checked before torch is, complained about in one sentence."""

# ruff: noqa: E501 (a complaint is read as one line)
import dataclasses
import json
import os
import subprocess
import sys

import pytest

from hf_ssl.cli import main
from hf_ssl.cli.console import UsageError, command_line, masked
from hf_ssl.cli.fields import UNKNOWN, config_flags, method_defaults, method_views, paper, train_flags, view_flags
from hf_ssl.cli.help import FREQUENT
from hf_ssl.cli.plan import plan_training
from hf_ssl.methods import METHODS, load
from hf_ssl.spelling import nearest

HEAVY = ("torch", "transformers", "datasets", "cv2", "numpy")


@pytest.fixture(autouse=True)
def _no_traceback(monkeypatch):
    monkeypatch.delenv("HF_SSL_DEBUG", raising=False)


def complaint(capsys, *argv: str) -> tuple[int, str]:
    code = main(list(argv))
    error = capsys.readouterr().err
    assert error.startswith("hf-ssl: ") and error.count("\n") == 1, error
    return code, error.removeprefix("hf-ssl: ").strip()


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"], ["train", "--help"], ["train", "dino", "--help-all"], ["demo", "--help"], ["evaluate", "--help"],
        ["embed", "--help"], ["export", "--help"], ["report", "--help"], ["methods", "--json"],
        ["train", "simclr", "--no_such_flag"], ["train", "simclr", "--max_steps", "many"],
    ],
)  # fmt: skip
def test_help_and_complaints_import_nothing_heavy(argv):
    code = (
        "import sys; from hf_ssl.cli import main; code = main(sys.argv[1:]);"
        f"bad = [m for m in {HEAVY} if m in sys.modules]; sys.exit(f'imported {{bad}}' if bad else 0)"
    )
    found = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("method", METHODS)
def test_flags_are_the_real_fields(method):
    from hf_ssl.processing import SSLImageProcessor
    from hf_ssl.processing.views import VIEW_FIELDS
    from hf_ssl.training.arguments import DataArguments, ModelArguments, SSLTrainingArguments

    flags = train_flags(method)
    for group, cls in (("data", DataArguments), ("model", ModelArguments), ("training", SSLTrainingArguments)):
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")}
        mine = {name for name, flag in flags.items() if flag.group == group}
        assert mine - set(fields) == set()
        assert set(fields) - mine <= {"parallelism_config"}  # an object that no text stands for
        for name in mine:
            if flags[name].default is not UNKNOWN and fields[name].default is not dataclasses.MISSING:
                assert flags[name].default == fields[name].default, name
    model = load(method)
    config = {f.name: f.default for f in dataclasses.fields(model.config_class)}
    for name, flag in config_flags(method).items():
        assert config[name] == flag.default, name
    own = {name for name in model.config_class.__annotations__ if name != "model_type"}
    assert own <= set(config_flags(method))
    assert set(VIEW_FIELDS) - {"key"} <= set(view_flags(method))
    assert SSLImageProcessor._attributes() <= set(view_flags(method))
    assert method_views(method) == [{"key": "pixel_values", **group} for group in model.processor_class.views]
    assert method_defaults(method) == model.default_arguments
    assert paper(method) == dataclasses.asdict(model.paper)
    assert set(FREQUENT) <= set(flags)


def test_choices_are_the_real_enums():
    from transformers.trainer_utils import SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    from hf_ssl.training.arguments import OPTIMISERS, SCHEDULES

    flags = train_flags("simclr")
    assert set(flags["lr_scheduler_type"].choices) == {*SCHEDULES, *(item.value for item in SchedulerType)}
    assert set(flags["save_strategy"].choices) == {item.value for item in SaveStrategy}
    assert set(flags["optim"].choices) == {item.value for item in OptimizerNames} | set(OPTIMISERS)
    assert flags["precision"].choices == ("auto", "fp32", "bf16", "fp16")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train", "simclr", "--temprature", ".1"], "train simclr: there is no flag --temprature; the nearest is --temperature."),
        (["train", "simclr", "--batch_size=4"], "train simclr: there is no flag --batch_size; the nearest is --per_device_train_batch_size."),
        (["train", "simclr", "--lr", "3"], "train simclr: there is no flag --lr; the nearest is --learning_rate."),
        (["train", "simclr", "--out_dim", "3"], "train simclr: --out_dim is a flag of dino, dinov2, dinov3, msn and pmsn, not of simclr."),
        (["train", "simcrl"], "train: there is no method 'simcrl'; the nearest is simclr."),
        (["train"], f"train: name the method first, one of {', '.join(METHODS)}."),
        (["trian"], "there is no command 'trian'; the nearest is train."),
        (["train", "simclr", "--optim", "lasr"], "train simclr: --optim must be one of 44 names (the nearest is lars), not 'lasr'."),
        (["train", "simclr", "--save_strategy", "step"], "train simclr: --save_strategy must be no, steps, epoch, best (the nearest is steps), not 'step'."),
        (["train", "simclr", "--max_steps", "1e3"], "train simclr: --max_steps must be a whole number, not '1e3'."),
        (["train", "simclr", "--max_steps", "0"], "train simclr: --max_steps must be -1 or at least 1, not '0'."),
        (["train", "simclr", "--max_steps"], "train simclr: --max_steps needs a value: a whole number."),
        (["train", "simclr", "--weight_decay", "-1"], "train simclr: --weight_decay must be 0 or more, not '-1'."),
        (["train", "simclr", "--learning_rate", "nan"], "train simclr: --learning_rate must be 0 or more, not 'nan'."),
        (["train", "simclr", "--temperature", "0"], "train simclr: --temperature must be positive, not '0'."),
        (["train", "simclr", "--bf16", "--fp16=maybe"], "train simclr: --fp16 must be true or false, not 'maybe'."),
        (["train", "simclr", "--scale", "2", ".5"], "train simclr: views: scale must be [low, high] above 0 and up to 1, not [2, 0.5]."),
        (["train", "dino", "--local_pixel_values", '{"cuont": 3}'], "train dino: --local_pixel_values has no field 'cuont' (the nearest is count)."),
        (["train", "dino", "--local_pixel_values", '{"count": "x"}'], "train dino: --local_pixel_values holds count, which must be a whole number, not 'x'."),
        (["train", "simclr", "--max_steps", "3", "--num_train_epochs", "2"], "train simclr: give max_steps or num_train_epochs, not both."),
        (["train", "simclr", "--bf16", "--precision", "fp32"], "train simclr: bf16 contradicts precision fp32; give one of them."),
        (["train", "simclr", "a.yaml", "b"], "train simclr: 'b' is one word too many; values follow a --flag."),
        (["evaluate", "m"], "evaluate: --dataset is missing, for example --dataset emoji."),
        (["evaluate", "m", "--dataset", "emoji", "--protocols", "knn,linaer"], "evaluate: --protocols knows no 'linaer'; the nearest is linear."),
        (["embed", "m", "--dataset", "emoji", "--output", "x.pkl"], "embed: --output ends in .parquet, .csv, .npz, .safetensors, not '.pkl'."),
        (["demo", "--steps", "0"], "demo: --steps must be at least 1, not '0'."),
        (["methods", "--jsno"], "methods: there is no flag --jsno; the nearest is --json."),
    ],
)  # fmt: skip
def test_a_complaint_is_one_sentence_that_names_the_nearest(capsys, argv, sentence):
    assert complaint(capsys, *argv) == (2, sentence)


def test_what_is_not_there_is_said_before_torch_is_imported(capsys, tmp_path):
    assert complaint(capsys, "evaluate", "./nowhere", "--dataset", "emoji") == (
        1,
        "evaluate: there is no model folder nowhere.",
    )
    code, sentence = complaint(capsys, "report", str(tmp_path / "none"))
    assert (code, sentence) == (1, f"report: there is no folder {tmp_path / 'none'}.")


def test_ways_to_write_a_flag():
    typed = "--max-steps=7 --bf16 --dataloader_pin_memory false --no_streaming --scale .2 1 --brightness 0.4"
    typed += " --report_to none --hidden_dim none --warmup_steps 0.1 --temperature=1"
    plan = plan_training(["simclr", *typed.split()])
    assert plan.values["max_steps"] == 7 and plan.values["precision"] == "bf16" and plan.values["streaming"] is False
    assert plan.values["dataloader_pin_memory"] is False and plan.values["scale"] == [0.2, 1]
    assert plan.values["brightness"] == 0.4 and plan.values["report_to"] == ["none"]
    assert plan.values["hidden_dim"] is None and plan.values["warmup_steps"] == 0.1
    assert plan.values["temperature"] == 1
    assert plan_training(["simclr", "--resume_from_checkpoint"]).values["resume_from_checkpoint"] is True
    assert plan_training(["simclr", "--resume_from_checkpoint", "run/checkpoint-3"]).values == {
        **plan_training(["simclr"]).values, "resume_from_checkpoint": "run/checkpoint-3",
    }  # fmt: skip


def test_nearest_prefers_spelling_then_words_then_initials():
    names = ("patch_size", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type")
    assert nearest("patchsize", names) == "patch_size"
    assert nearest("batch_size", names) == "per_device_train_batch_size"
    assert nearest("lr", names) == "learning_rate"
    assert nearest("qqqq", names) is None


def test_secrets_are_masked():
    line = command_line(["train", "simclr", "--hub_token", "abc", "--hub-token=abc", "--seed", "3"])
    assert line == "hf-ssl train simclr --hub_token *** '--hub-token=***' --seed 3"
    assert "hf_AbCdEfGhIjKlMnOpQr" not in command_line(["train", "--run_name", "x-hf_AbCdEfGhIjKlMnOpQr"])
    found = masked({"hub_token": "a", "deep": [{"api_key": "b", "max_steps": 3}], "url": "https://me:pw@host/x"})
    assert found == {"hub_token": "***", "deep": [{"api_key": "***", "max_steps": 3}], "url": "https://***@host/x"}


def test_methods_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(METHODS)
    assert rows["mae"]["arxiv"] == "2111.06377" and rows["dino"]["family"] == "joint_embedding"
    assert all(row["title"] and row["teaches"] for row in rows.values())


def test_a_traceback_comes_where_it_was_asked_for(capsys, monkeypatch):
    assert main(["evaluate", "./nowhere", "--dataset", "emoji", "--debug-traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setitem(os.environ, "HF_SSL_DEBUG", "1")
    assert main(["report", "./nowhere"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_usage_errors_are_no_value_errors():
    assert not issubclass(UsageError, ValueError)  # a bad value inside a library must not pass for wrong usage


@pytest.mark.parametrize("given", [".5,.4,.3", "[0.5, 0.4, 0.3]"])
def test_mean_and_deviation_are_lists_in_every_command(given, tmp_path, monkeypatch):
    from hf_ssl.cli.convert import FLAGS
    from hf_ssl.cli.flags import parse

    monkeypatch.chdir(tmp_path)
    plan = plan_training(["simclr", "--dataset", ".", "--image_mean", given, f"--image_std={given}"])
    assert plan.group("views") == {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.4, 0.3]}
    flags = {flag.name: flag for flag in FLAGS}
    assert parse(["--image_mean", given], flags, "convert").values == {"image_mean": [0.5, 0.4, 0.3]}
    (tmp_path / "mine.yaml").write_text("image_mean: [0.5, 0.4, 0.3]\nimage_std: 0.5\n")
    values = plan_training(["simclr", str(tmp_path / "mine.yaml"), "--dataset", "."]).group("views")
    assert values == {"image_mean": [0.5, 0.4, 0.3], "image_std": 0.5}  # one number stands for every channel


@pytest.mark.parametrize("given", ["", "x", ".5,x,.5", ".5,,.5", "[.5", "nan,1,1", "[1, [2], 3]", "1e999"])
def test_what_is_no_list_of_numbers_is_a_sentence(given, capsys):
    for command in (["train", "simclr", "--dataset", "emoji"], ["convert", "x.pth", "--output", "o"]):
        code, sentence = complaint(capsys, *command, f"--image_mean={given}")
        assert code == 2 and "--image_mean must be numbers such as 0.5,0.5,0.5" in sentence
