"""Numbers are checked where they are stated, by the class itself; the command line repeats it and guesses nothing."""

import dataclasses
import math

import pytest

from hf_ssl import limits
from hf_ssl.cli import main
from hf_ssl.cli.fields import UNKNOWN, config_flags, train_flags
from hf_ssl.cli.flags import BadValue, convert
from hf_ssl.cli.plan import OWN, plan_training
from hf_ssl.methods import METHODS, load
from hf_ssl.training import DataArguments, LabelArguments, ModelArguments, SSLTrainingArguments, TextArguments

NUMBERS = ("int", "float")


@pytest.mark.parametrize(
    ("interval", "good", "bad", "words"),
    [
        ("(0, inf)", (1e-9, 5), (0, -1, math.inf, math.nan), "positive"),
        ("[0, inf)", (0, 3), (-1e-9, math.nan), "0 or more"),
        ("[1, inf)", (1, 2**31 - 1), (0, 0.5), "at least 1"),
        ("[0, 1]", (0, 1, 0.5), (-0.1, 1.1, math.nan), "from 0 to 1"),
        ("[0, 1)", (0, 0.999), (1, -0.1), "at least 0 and below 1"),
        ("(0, 1]", (1, 1e-9), (0, 1.1), "above 0 and at most 1"),
        ("(0, 1)", (0.5,), (0, 1), "above 0 and below 1"),
        ("-1 or [1, inf)", (-1, 1), (0, -2, -0.5), "-1 or at least 1"),
        ("[0, 4294967295]", (0, 2**32 - 1), (2**32, -1), "from 0 to 4294967295"),
    ],
)
def test_intervals(interval, good, bad, words):
    assert limits.words(interval) == words
    assert [limits.problem(value, interval) for value in good] == [None] * len(good)
    assert [limits.problem(value, interval) for value in bad] == [f"must be {words}"] * len(bad)


def test_what_is_not_named():
    assert limits.problem(-1, None, default=0.5) == "must be 0 or more"
    assert limits.problem(-1, None, default=-1) is None is limits.problem(-1, None)
    assert limits.problem(10**11, "[1, inf)") == "must be at most 2147483647"
    assert limits.problem(True, "[5, inf)") is None is limits.problem("x", "[5, inf)")


@pytest.mark.parametrize("method", METHODS)
def test_every_default_is_accepted_and_every_field_refuses_what_it_must(method):
    """By the config itself, with a sentence that names the field, and by the command line in the same words."""
    config_class = load(method).config_class
    config_class()
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    stated = limits.limits_of(config_class)
    flags = {name: flag for name, flag in config_flags(method).items() if flag.kinds[0] in NUMBERS}
    for name, flag in flags.items():
        default = fields[name].default
        assert convert(flag, str(default)) == default == convert(flag, default), name
        assert flag.limits == stated.get(name), name
        config_class(**{name: default})
        for value in (math.nan, math.inf, -3, -math.inf, 2**31, 10**400):
            if not isinstance(value, int) and "float" not in flag.kinds:
                continue
            with pytest.raises(ValueError, match=f"(?s)^{name}|{name}"):
                config_class(**{name: value})
            if limits.problem(value, flag.limits, default):  # else the config's own words come later
                with pytest.raises(BadValue):
                    convert(flag, str(value))


def test_what_methods_state_names_fields_that_exist():
    known = {field.name for method in METHODS for field in dataclasses.fields(load(method).config_class)}
    for method in METHODS:
        assert set(limits.limits_of(load(method).config_class)) <= known


@pytest.mark.parametrize("method", ["simclr", "fixmatch", "clip"])
def test_no_flag_refuses_its_own_default(method):
    for name, flag in {**train_flags(method), **OWN}.items():
        if flag.default is UNKNOWN:
            continue
        if flag.default is not None or flag.optional:
            convert(flag, flag.default)
        if isinstance(flag.default, (int, float)) and not isinstance(flag.default, bool):
            assert convert(flag, str(flag.default)) == flag.default, name


def test_the_default_of_fixmatch_can_be_typed(tmp_path):
    assert plan_training(["fixmatch", "--dataset", "emoji", "--temperature", "0"]).values["temperature"] == 0
    (tmp_path / "mine.yaml").write_text("temperature: 0\n")
    assert plan_training(["fixmatch", str(tmp_path / "mine.yaml"), "--dataset", "emoji"]).values["temperature"] == 0
    assert (
        plan_training(["msn", "--dataset", "emoji", "--sinkhorn_iterations", "0"]).values["sinkhorn_iterations"] == 0
    )
    # a view that is left out: its count is 0
    plan = plan_training(["dino", "--dataset", "emoji", "--local_pixel_values", '{"count": 0}'])
    assert plan.values["local_pixel_values"]["count"] == 0


@pytest.mark.parametrize("cls", [DataArguments, ModelArguments, LabelArguments, TextArguments, SSLTrainingArguments])
def test_arguments_check_themselves(cls, tmp_path):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    stated = limits.limits_of(cls)
    assert set(stated) <= set(fields)
    needed = {"output_dir": str(tmp_path)} if cls is SSLTrainingArguments else {}
    for name, interval in stated.items():
        assert limits.problem(fields[name].default, interval) is None, name
        low = -2 if interval.startswith(("-1", "[-1")) else -1
        with pytest.raises(ValueError, match=f"^{name} must be "):
            cls(**needed, **{name: low})


def test_numbers_no_machine_holds_are_named(tmp_path, capsys):
    (tmp_path / "huge.yaml").write_text("projection_dim: 100000000000\nseed: 99999999999999999999\n")
    assert main(["train", "simclr", str(tmp_path / "huge.yaml"), "--dataset", "emoji"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("huge.yaml: projection_dim must be at most 2147483647, not 100000000000.\n")
    for flag in ("seed", "image_size", "per_device_train_batch_size", "max_steps", "dataloader_num_workers"):
        assert main(["train", "simclr", "--dataset", "emoji", f"--{flag}", "99999999999999999999"]) == 2
        assert f"--{flag} must be " in capsys.readouterr().err
