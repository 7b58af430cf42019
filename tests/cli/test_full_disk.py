"""Every command that writes: where that fails, the old file stays, nothing is left behind, a sentence, exit 1."""

import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_ssl.cli import main
from hf_ssl.cli.runfolder import write_run
from hf_ssl.files import WriteError
from hf_ssl.hub import export, load_method, write_card, write_model
from tests.contract.tiny import VIT, build, pictures, processor
from tests.hub.official_files import state, vit


@contextmanager
def files_of_at_most(size: int):
    """Whatever writes more into a file fails, as on a full disk: for everybody, with or without root."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, a classifier, an official file and labelled pictures."""
    root = tmp_path_factory.mktemp("work")
    for i, picture in enumerate(pictures(12)):
        folder = root / "pictures" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i}.png")
    export(build("simclr", VIT), processor("simclr"), root / "model")
    export(build("fixmatch", VIT), processor("fixmatch"), root / "classifier")
    torch.save(state(vit()), root / "official.pth")
    return root


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


DATA = "--dataset {work}/pictures --device cpu"
COMMANDS = {
    "embed.parquet": f"embed {{work}}/model {DATA} --output {{out}}/embed.parquet",
    "embed.csv": f"embed {{work}}/model {DATA} --output {{out}}/embed.csv",
    "embed.npz": f"embed {{work}}/model {DATA} --output {{out}}/embed.npz",
    "embed.safetensors": f"embed {{work}}/model {DATA} --output {{out}}/embed.safetensors",
    "labels.parquet": f"pseudo-label {{work}}/classifier {DATA} --output {{out}}/labels.parquet",
    "rows.json": f"evaluate {{work}}/model {DATA} --protocols health --json {{out}}/rows.json",
    "model": "export {work}/model --output {out}/model --overwrite",
    "official": "convert {work}/official.pth --output {out}/official --num_heads 2 --overwrite",
    "report.html": "report {out}/model",
}


def test_a_full_disk_leaves_what_was_there(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for round_ in ("nothing there", "an old one there"):
        for name, command in COMMANDS.items():
            words = command.format(work=work, out=tmp_path).split()
            before = contents(tmp_path)
            capsys.readouterr()
            with files_of_at_most(200):
                assert main(words) == 1, (name, round_)
            assert contents(tmp_path) == before, (name, round_)
            said = capsys.readouterr().err
            path = tmp_path / "model" / name if name == "report.html" else tmp_path / name
            assert f"hf-ssl: {path} cannot be written: " in said and "Traceback" not in said, said
            kept = "nothing was left there" if round_ == "nothing there" else "what was there before is untouched"
            assert kept in said, said
            assert main(words) == 0, (name, round_)  # and with space it is there
            assert path.exists(), (name, round_)
    assert not [path for path in tmp_path.rglob("*") if ".part" in path.name]


def test_the_end_of_a_run_leaves_the_model_and_the_record_that_were_there(work: Path, tmp_path: Path) -> None:
    model, views = load_method(work / "model")
    write_model(model, views, tmp_path)
    write_card(model, tmp_path)
    write_run(tmp_path, {"steps": 1})
    before = contents(tmp_path)
    for action in (
        lambda: write_model(model, views, tmp_path),
        lambda: write_card(model, tmp_path, {"dataset": "other"}),
        lambda: write_run(tmp_path, {"steps": "2" * 300}),
    ):
        with files_of_at_most(200), pytest.raises(WriteError, match="what was there before is untouched"):
            action()
        assert contents(tmp_path) == before
