"""What ``hf-ssl convert`` refuses, each in one sentence, with nothing left behind."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ssl.cli import main
from hf_ssl.hub import CheckpointError, convert_checkpoint
from hf_ssl.hub.official import OFFICIAL
from hf_ssl.methods import METHODS
from tests.hub.official_files import dino_file, resnet, state, vit


def bad_vit(**changes: Tensor | None) -> dict[str, Tensor]:
    found = state(vit()) | {name.replace("__", "."): t for name, t in changes.items() if t is not None}
    return {name: t for name, t in found.items() if changes.get(name.replace(".", "__"), True) is not None}


@pytest.mark.parametrize(
    ("found", "options", "words"),
    [
        (lambda: dino_file(vit(), vit()), {"method": "mae"}, "looks like dino.*--method dino"),
        (lambda: {"a.weight": torch.zeros(2, 2)}, {}, "no backbone that convert knows.*a.weight"),
        (lambda: state(vit(init_values=0.1)), {"method": "mae"}, "--method dinov2"),
        (lambda: state(resnet()), {"method": "ijepa"}, "kind resnet.*--method backbone"),
        (lambda: state(resnet()), {"method": "mocov2"}, "no method 'mocov2'"),
        (lambda: state(vit()), {"which": "teacher"}, "no teacher.*leave --which out"),
        (lambda: bad_vit(norm__weight=None), {}, "layernorm.weight is missing"),
        (lambda: bad_vit(norm_pre__weight=torch.ones(128)), {}, "norm_pre.weight would change the features"),
        (lambda: bad_vit(norm__weight=torch.ones(64)), {}, "layernorm.weight .64,. for .128,. is the wrong shape"),
        (lambda: bad_vit(norm__weight=torch.full((128,), float("nan"))), {}, "not finite"),
        (lambda: state(vit(embed_dim=96, num_heads=3)), {}, "give --num_heads"),
        (lambda: state(vit()), {"num_heads": 7}, "7 does not divide the width, 128"),
        (lambda: state(vit(img_size=(32, 64))), {}, "32 patches.*--image_size HEIGHT,WIDTH"),
        (lambda: state(resnet()) | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, {}, "7x7"),
        (lambda: state(resnet()) | {"layer2.0.se.fc.weight": torch.zeros(4, 4)}, {}, "se.fc.weight would change"),
        (lambda: {"a": state(vit()), "b": state(vit())}, {}, "2 backbones, under a., b."),
        (lambda: {"model": state(vit()), "state_dict": state(vit())}, {}, "twice"),
        (lambda: [torch.zeros(3)], {}, "holds a list"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_in_a_sentence(
    found: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    torch.save(found(), tmp_path / "official.pth")
    with pytest.raises(CheckpointError, match=words):
        convert_checkpoint(tmp_path / "official.pth", tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official.pth"]  # nothing is left behind


def test_an_earlier_folder_is_replaced_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(state(vit()), tmp_path / "vit.pth")
    out = tmp_path / "out"
    argv = ["convert", str(tmp_path / "vit.pth"), "--output", str(out)]
    assert main(argv) == 0
    assert main(argv) == 1 and "--overwrite replaces it" in capsys.readouterr().err
    readme = out / "README.md"
    readme.write_text(readme.read_text() + "\nMy own words.\n")
    assert main([*argv, "--overwrite"]) == 0 and "My own words." in readme.read_text()
    (out / "mine.txt").write_text("keep me")
    assert main([*argv, "--overwrite"]) == 1 and "mine.txt" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "keep me" and (out / "config.json").is_file()


def test_the_command_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for argv, words in (
        ([], "give one FILE"),
        (["x.pth"], "--output is missing"),
        (["x.pth", "--output", str(tmp_path / "o"), "--method", "dion"], "dino"),
        (["x.pth", "--output", str(tmp_path / "o"), "--image_size", "big"], "--image_size must be pixels"),
    ):
        assert main(["convert", *argv]) == 2
        assert words in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "absent.pth"), "--output", str(tmp_path / "o")]) == 1
    assert "absent.pth cannot be read: No such file" in capsys.readouterr().err


def test_every_method_of_the_table_is_known_or_has_a_paper() -> None:
    for name, entry in OFFICIAL.items():
        assert name in METHODS or name == "backbone" or (entry.title and entry.arxiv), name


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, capsys) -> None:
    os.mkfifo(tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), "--output", str(tmp_path / "out")]) == 1
    assert "a.pth cannot be read: a pipe, not a regular file" in capsys.readouterr().err
