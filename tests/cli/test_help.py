"""What --help says: whole sentences, for every method and every command."""

import re

import pytest

from hf_ssl.cli import _COMMANDS, _command, main
from hf_ssl.cli.fields import Flag, config_flags, train_flags, view_flags
from hf_ssl.cli.help import command_help, flag_lines, train_help
from hf_ssl.cli.plan import OWN, plan_training
from hf_ssl.cli.vocabulary import FIELDS, VIEWS
from hf_ssl.methods import METHODS


def faults(text: str) -> list[str]:
    """What keeps a help text from being whole sentences that a user understands."""
    found = []
    if not text:
        return ["is empty"]
    if not text.endswith(".") or text.endswith(".."):
        found.append("does not end with a full stop")
    if text[0].islower():
        found.append("begins small")
    if sum(text.count(sign) for sign in "([") != sum(text.count(sign) for sign in ")]"):  # [0, 1) is an interval
        found.append("has an open bracket")
    if text.count("`") % 2 or "``" in text:
        found.append("has an open quotation")
    for leftover in ("ValueError", "TypeError", "The rest:", "(see above)", ";.", ":.", ",."):
        if leftover in text:
            found.append(f"holds {leftover}")
    return found


def test_the_check_notices():
    for text in ("", "no capital.", "Open (bracket.", "No stop", "ValueError where it is.", "``Config``.", "Ends;."):
        assert faults(text), text


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_of_a_method_is_told_in_sentences(method):
    bad = {name: (found, flag.help) for name, flag in train_flags(method).items() if (found := faults(flag.help))}
    assert not bad


@pytest.mark.parametrize("name", [name for name in _COMMANDS if name != "train"])
def test_every_flag_of_a_command_is_told_in_sentences(name):
    flags = {flag.name: flag for flag in (*_command(name).flags, *OWN.values())}
    assert not {flag.name: flag.help for flag in flags.values() if faults(flag.help)}
    assert "usage: " in command_help(_command(name).usage, _COMMANDS[name], flags)


def test_the_vocabulary_names_the_fields_that_there_are():
    fields = {name for method in METHODS for name in config_flags(method)}
    assert fields == set(FIELDS)
    views = {name for method in METHODS for name in view_flags(method) if not name.endswith("pixel_values")}
    assert set(VIEWS) <= views | {"context_length", "num_channels"} and views <= set(VIEWS)


@pytest.mark.parametrize("method", [None, *METHODS])
def test_the_page_of_a_method(method, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for everything in (False, True):
        page = train_help(method, everything)
        assert "backbone without labels" not in page
        paragraphs = re.split(r"\n  --", page)[1:]
        for paragraph in paragraphs:
            text = " ".join(paragraph.split("\n\n")[0].split())
            assert text.endswith("."), text
            assert text.count("(") + text.count("[") == text.count(")") + text.count("]"), text
    if method == "fixmatch":
        assert "--labels_per_class N" in page
    if method:
        flags = train_flags(method)
        for name in [name for name, flag in flags.items() if "float" in flag.kinds and "bool" not in flag.kinds]:
            assert f"  --{name} X" in page, name


def test_the_dots_of_an_enumeration_stay():
    ends = [flag_lines([Flag("x", ("str",), None, f"{text}.")])[0][36:] for text in ("One of a, b, ..", "A name")]
    assert ends == ["One of a, b, ...", "A name."]


def test_demo_data_must_be_asked_for(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in ("simclr", "fixmatch", "clip"):
        assert main(["train", method, "--max_steps", "1", "--backbone", "no-such-preset"]) == 2
        said = capsys.readouterr().err
        assert f"train {method}: --dataset is missing, for example --dataset my_photos/, or --dataset emoji" in said
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine.yaml").write_text("dataset: emoji\n")
    assert plan_training(["simclr", "mine.yaml"]).dataset == "emoji"
