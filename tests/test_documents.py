"""YAML and JSON of a user: plain data, or a sentence at once."""

import json
import os
import sys

import pytest

from hf_ssl.cli import main
from hf_ssl.data.labels import SourceError, _read_ids
from hf_ssl.documents import (
    MAX_BYTES,
    MAX_NODES,
    DocumentError,
    parse,
    parse_json,
    parse_yaml,
    read_document,
    read_json,
)
from hf_ssl.evaluation import load_prompts

LEVELS = [f"b{i}: &b{i} [{', '.join(['*a' if i == 0 else f'*b{i - 1}'] * 50)}]" for i in range(6)]
ALIASES = ", ".join([f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)])
BAD = {
    "aliases": (f"a: [&a0 [{', '.join(['lol'] * 10)}], {ALIASES}]\n", "line 1: it stands for more than"),
    "aliases of mappings": ("\n".join(["a: &a {x: 1, y: 2}", *LEVELS]), "it stands for more than"),
    "an alias of itself": ("a: &a [*a]", "names nothing above it, or itself"),
    "an alias of nothing": ("a: *b", "names nothing above it"),
    "a list as a key": ("[1, 2]: 3\n", "line 1: a key must be text"),
    "a mapping as a key": ("x: 1\n{a: 1}: 3\n", "line 2: a key must be text"),
    "an alias as a key": ("a: &a x\n*a : 3\n", "line 2: a key must be text"),
    "a complex key": ("? [a]\n: b\n", "a key must be text"),
    "brackets": ("a: " + "[" * 3000 + "]" * 3000, "nest"),
    "braces": ("{a: " * 3000, "nests more than 32 deep"),
    "dashes": ("- " * 3000, "nests more than 32 deep"),
    "indented": ("".join(" " * i + "a:\n" for i in range(900)), "nests more than 32 deep"),
    "JSON brackets": ('{"a": ' + "[" * 100_000, "nests more than 32 deep"),
    "JSON in JSON": ('{"a": ' * 3000, "nests more than 32 deep"),
    "a long number": ("a: " + "9" * 5000, "is not a number that a machine holds"),
    "a long number of base 60": ("a: 1" + ":1" * 200_000, "is not a number that a machine holds"),
    "a long number in JSON": ('{"a": ' + "9" * 5000 + "}", "thousands of digits"),
    "half a number": ("a: 0x_", "line 1: '0x_' is not a number"),
    "nan": ("a: 1\nb: .nan", "line 2: '.nan' is not a number"),
    "infinity": ("a: -.inf", "'-.inf' is not a number"),
    "a large float": ("a: 1.0e+999", "is not a number that a machine holds"),
    "nan in JSON": ('{"a": NaN}', "NaN is not a number"),
    "infinity in JSON": ('{"a": -Infinity}', "Infinity is not a number"),
    "a large float in JSON": ('{"a": 1e999}', "larger than any number"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", "'a' is given twice (line 1 on)"),
    "a key twice in JSON": ('{"a": 1, "a": 2}', "'a' is given twice"),
    "a merge": ("a: &a {b: 1}\nc: {<<: *a}", "line 2: << takes over no other fields"),
    "a tag of Python": ("a: !!python/object/apply:os.system [ls]", "python/object/apply:os.system is not read"),
    "a broken tag": ("a: !!binary xx\n", "the tag"),
    "a float tag": ("a: !!float x\n", "the tag"),
    "a timestamp tag": ("a: !!timestamp x\n", "the tag"),
    "a tab": ("a:\n\t- b\n", "it is not YAML at line 2"),
    "control characters": ("a: b\0c", "it is not YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2: it holds more than one document"),
    "neither": ("{a: 1", "it is neither YAML nor JSON"),
    "too many values": ("\n".join(f"k{i}: v" for i in range(MAX_NODES)), "it stands for more than"),
    "an open string": ('{"a": "' + '\\"' * 200_000, "it is neither YAML nor JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_a_sentence(name, tmp_path, capsys):
    text, words = BAD[name]
    with pytest.raises(DocumentError) as caught:
        parse(text)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    (file := tmp_path / "it.yaml").write_text(text)
    assert main(["train", "simclr", str(file), "--dataset", "emoji"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hf-ssl: recipe {file}: ") and words in said and said.count("\n") == 1
    with pytest.raises(ValueError, match=r"it\.yaml"):
        load_prompts(file)


def test_what_is_no_text_is_named(tmp_path):
    file = tmp_path / "it.yaml"
    for data, words in (
        (b"a: 1\nb: \xff\xfe\n", "line 2: it is not text in UTF-8"),
        ("a: 1".encode("utf-16"), "it is not text in UTF-8"),
        (b"#" * (MAX_BYTES + 1), "at most 4,194,304 are read"),
    ):
        file.write_bytes(data)
        with pytest.raises(DocumentError, match=words):
            read_document(file)
    with pytest.raises(DocumentError, match="not an ordinary file"):
        read_document(tmp_path)
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(DocumentError, match="not an ordinary file"):  # and does not wait for a writer
            read_document(tmp_path / "pipe")


def test_good_documents_are_read_as_before(tmp_path):
    text = "a: [1, no, ~, 1e-3, 1.5, 'x', 2020-01-01, 0x1f]\nno: 3\n1: 4\nb: &b {c: 1}\nd: [*b, *b]\n"
    found = parse_yaml(text)
    assert found["a"] == [1, False, None, "1e-3", 1.5, "x", "2020-01-01", 31]
    assert found["no"] == 3 and found["1"] == 4 and found["d"] == [{"c": 1}] * 2
    assert parse_yaml("# nothing\n") is None and parse("{a: 1}") == {"a": 1} == parse('{"a": 1}')
    (tmp_path / "bom.yaml").write_bytes("\ufeffa: ü\n".encode())
    assert read_document(tmp_path / "bom.yaml") == {"a": "ü"}
    names = {f"class {i}": [f"a thing {j}" for j in range(40)] for i in range(1000)}
    assert parse(json.dumps({"classes": names})) == {"classes": names}
    (tmp_path / "log.json").write_text('{"loss": NaN}')
    assert read_json(tmp_path / "log.json")["loss"] != 0


def test_prompts_of_classes_that_yaml_takes_for_something_else(tmp_path):
    (tmp_path / "p.yaml").write_text("classes:\n  no: [a sign]\n  1: [one]\n  2020-01-01: [new year]\n")
    assert set(load_prompts(tmp_path / "p.yaml").classes) == {"no", "1", "2020-01-01"}


def test_flags_and_row_numbers_are_bounded_too(tmp_path, capsys):
    deep, long = "[" * 3000 + "]" * 3000, "9" * 5000
    for flags, words in (
        (["simclr", "--views", deep], "nests more than 32 deep"),
        (["dino", "--local_pixel_values", '{"count": ' + deep + "}"], "nests more than 32 deep"),
        (["dino", "--local_pixel_values", '{"count": 1, "count": 2}'], "'count' is given twice"),
        (["dino", "--local_pixel_values", '{"count": NaN}'], "NaN is not a number"),
        (["simclr", "--seed", long], "--seed must be a whole number"),
        (["simclr", "--learning_rate", long], "--learning_rate must be 0 or more"),
        (["simclr", "--scale", f"{long},1"], "--scale must be two numbers"),
    ):
        assert main(["train", *flags]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and len(said) < 400, said
    for text in (deep, '{"rows": ' + deep + "}", "[NaN]", f"[{long}]", '{"rows": 1, "rows": 2}'):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(SourceError, match=r"rows\.json"):
            _read_ids(tmp_path / "rows.json")
    (tmp_path / "rows.txt").write_text(long)
    [(place, value)], _ = _read_ids(tmp_path / "rows.txt")
    assert place.endswith("rows.txt, line 1") and value == "9" * 80  # refused as no row number


@pytest.mark.parametrize("text", ["[" * 3000, "[1]", '{"model_type": 3}', "{", "\0", "9" * 5000])
def test_a_folder_with_such_json_is_a_sentence(text, tmp_path, capsys):
    for name in ("config.json", "run.json", "trainer_state.json"):
        (tmp_path / name).write_text(text)
    for command in (["evaluate", str(tmp_path), "--dataset", "emoji"], ["export", str(tmp_path), "--output", "x"]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert said.startswith("hf-ssl: ") and said.count("\n") == 1 and tmp_path.name in said, said


def test_json_keeps_its_doctest():
    assert parse_json('{"count": 4}') == {"count": 4}
