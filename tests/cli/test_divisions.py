"""Every entry point takes its rows from the one division: what is scored is nowhere trained on."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hf_ssl
from hf_ssl.cli import main
from hf_ssl.cli.console import CommandError
from hf_ssl.cli.pictures import load_pictures
from hf_ssl.cli.plan import plan_training
from hf_ssl.cli.train import check_division, run
from hf_ssl.data import load_source
from hf_ssl.evaluation.album import Run, labels_seen
from hf_ssl.evaluation.report import write_report
from hf_ssl.hub.card import model_card
from hf_ssl.methods import METHODS, load

SMALL = [
    "--backbone", "resnet-pico", "--image_size", "12", "--use_cpu", "--disable_tqdm", "--precision", "fp32",
    "--report_to", "none", "--save_strategy", "no",
]  # fmt: skip


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """80 pictures of pure noise in two classes, each with a text: what is learned of one tells nothing of another."""
    torch.set_num_threads(1)
    root, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir()
        for i in range(40):
            Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).save(root / name / f"{i}.png")
            (root / name / f"{i}.txt").write_text(f"{name} {i}\n")
    return root


def files(*sources) -> set[str]:
    return {row["image"]["path"] for source in sources if source is not None for row in source.dataset}


def labelled(found):
    return None if found.sources.labeled is None else found.sources.labeled.source


def plan_of(method, *argv):
    return plan_training([method, *map(str, argv)])


@pytest.mark.parametrize(
    "flags", [[], ["--validation_fraction", "0.25", "--eval_strategy", "steps"]], ids=["", "validated"]
)
@pytest.mark.parametrize("method", METHODS)
def test_no_method_trains_on_what_it_is_scored_on(method, flags, noise, capsys):
    few = ["--label_fraction", "1.0"] if load(method).reads == "labels" else []
    found = load_pictures(plan_of(method, "--dataset", noise, *flags, *few))
    trained, scored = files(found.sources.train, labelled(found)), files(*(held for held in found.division.held))
    validated = files(found.division.validation)
    assert len(trained) == (48 if flags else 64) and len(scored) == (32 if flags else 16)
    assert not trained & scored and len(trained | scored) == 80
    assert [len(queries) for _, queries in found.pairs] == [16]
    assert not files(found.pairs[0][0]) & files(found.pairs[0][1])
    bank, queries = found.online
    assert files(queries) == (validated if flags else scored) and files(bank) == trained
    assert "are kept for it" in capsys.readouterr().out
    if load(method).needs_index:  # a row of memory for each picture that trains
        from hf_ssl.training.build import _count_rows

        assert _count_rows(method, found.sources.train, None) == len(trained)


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        (["--eval_dataset", "{noise}/."], 64),
        (["--eval_split", "train"], 64),
        (["--unlabeled_dataset", "{noise}"], 64),
        (["--unlabeled_dataset", "{noise}/ant"], 64),  # other names for the same files: found by their bytes
        (["--no_evaluation"], 80),
        (["--validation_split", "train"], "is trained on, so nothing can be validated"),
        (["--validation_split", "train", "--validation_fraction", "0.1"], "not both"),
        (["--label_ids", "[{kept}]"], "is kept to validate or test on"),
    ],
)
def test_flags_that_point_back_at_the_training_pictures(flags, trained, noise, tmp_path, capsys):
    kept = load_pictures(plan_of("simclr", "--dataset", noise)).pairs[0][1].number(0)
    flags = [flag.format(noise=noise, kept=kept) for flag in flags]
    if flags[0] == "--label_ids":
        (tmp_path / "rows.txt").write_text(f"{kept}\n")
        flags[1] = str(tmp_path / "rows.txt")
    plan = plan_of("fixmatch", "--dataset", noise, *flags)
    if isinstance(trained, str):
        with pytest.raises((ValueError, CommandError), match=trained):
            load_pictures(plan)
        return
    found = load_pictures(plan)
    seen = files(labelled(found), found.sources.train)
    assert len(seen) == trained and not seen & files(*(queries for _, queries in found.pairs))
    assert ("No picture is kept to test on." in capsys.readouterr().out) == (trained == 80)


@pytest.fixture(scope="module")
def finished(noise, tmp_path_factory) -> tuple[Path, dict]:
    """FixMatch that learns every label of the noise by heart: (folder, run.json)."""
    folder = tmp_path_factory.mktemp("runs") / "fixmatch"
    argv = [
        "--dataset", noise, "--output_dir", folder, "--label_fraction", "1.0", "--unlabeled_ratio", "0", "--no_report",
        "--per_device_train_batch_size", "16", "--max_steps", "60", "--learning_rate", "0.1", "--ema_momentum", "0.5",
        "--pixel_values", '{"hflip": 0.0, "translate": 0.0}', *SMALL,
    ]  # fmt: skip
    run(plan_of("fixmatch", *argv), measures=("classification",))
    return folder, json.loads((folder / "run.json").read_text())


def test_accuracy_on_pure_noise_is_chance(finished, noise):
    folder, record = finished
    rows = {row["model"]: row["accuracy"] for row in record["results"]}
    assert 0.2 <= rows["EMA weights"] <= 0.8 and 0.2 <= rows["last weights"] <= 0.8  # .94 and 1.0 where they leak
    from hf_ssl.evaluation import predict

    found = predict(str(folder), load_source(str(noise)))
    kept = np.setdiff1d(np.arange(80), record["labeled"]["rows"])
    right = (found.probabilities.argmax(1) == found.labels).numpy()
    assert right[record["labeled"]["rows"]].mean() > 0.9  # they were learned by heart: the check can fail
    assert len(kept) == 16 and right[kept].mean() == pytest.approx(rows["EMA weights"])


def test_run_json_card_and_model_index_say_how_the_rows_were_divided(finished, noise):
    folder, record = finished
    division = record["division"]
    assert [division[name] for name in ("train", "validation", "test", "of")] == [64, 0, 16, 80]
    assert "16 of its 80 pictures, a fixed draw, are kept for it" in division["rule"]
    card = (folder / "README.md").read_text()
    assert "64 to train, 0 to validate, 16 to test" in card and "16 of its 80 pictures" in card
    assert str(noise.parent) not in card
    assert record["evaluated_on"][str(noise)]["split"] == "train (held out)" and "split: train (held out)" in card
    method, _ = hf_ssl.hub.load_method(folder)
    leaky = model_card(method, {**record, "division": {"train": 80, "measured": 16, "trained_on": 16}}, "me/it")
    assert leaky.data.eval_results is None  # no figure that is published as a result
    assert "16 of the 16 pictures that are measured on were trained on" in str(leaky)


def test_evaluate_scores_the_kept_rows_and_says_which_were_trained_on(finished, noise, tmp_path, capsys):
    folder, record = finished

    def rows(model, *argv):
        command = ["evaluate", model, "--dataset", noise, "--protocols", "classification", "--json", tmp_path / "j"]
        assert main([str(word) for word in [*command, *argv]]) == 0
        return {row["model"]: row for row in json.loads((tmp_path / "j").read_text())}

    same = rows(folder)
    own = {row["model"]: row for row in record["results"]}
    assert (
        same["EMA weights"]["accuracy"] == own["EMA weights"]["accuracy"] and "trained_on" not in same["EMA weights"]
    )
    assert "were trained on" not in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "leaky")
    everything = load_pictures(plan_of("simclr", "--dataset", noise, "--no_evaluation")).record()
    (tmp_path / "leaky" / "run.json").write_text(json.dumps({**record, "division": everything}))
    told = rows(tmp_path / "leaky")
    assert told["EMA weights"]["trained_on"] == 16
    assert "16 of the 16 pictures" in (out := capsys.readouterr().out) and "are not a test" in out
    warm = plan_of("simclr", "--dataset", noise, "--backbone", tmp_path / "leaky")
    load_pictures(warm)
    assert "16 of the 16 pictures" in capsys.readouterr().out


def test_pseudo_labels_leave_out_what_is_kept(finished, noise, tmp_path, capsys):
    from hf_ssl.evaluation import load_pseudo_labels

    command = ["pseudo-label", finished[0], "--dataset", noise, "--output", tmp_path / "p.parquet"]
    assert main([str(word) for word in command]) == 0
    found = load_pseudo_labels(tmp_path / "p.parquet")
    assert set(found["index"]) == set(finished[1]["labeled"]["rows"])  # numbers of the whole folder
    assert "16 of its 80 pictures are left out" in capsys.readouterr().out
    assert main([str(word) for word in [*command, "--held_out"]]) == 0
    assert len(load_pseudo_labels(tmp_path / "p.parquet")) == 80


def test_the_report_shows_the_kept_rows_and_says_whose_labels_were_seen(finished, noise):
    source = Run.open(finished[0]).source()
    numbers = {source.number(i) for i in range(len(source))}
    labeled = finished[1]["labeled"]
    assert len(numbers) == 16 and not numbers & set(labeled["rows"])
    page = write_report(finished[0], progress=False).read_text()
    assert "the label, which training saw of 64 other pictures and of none of these" in page
    assert 'class="missing"' not in page and 'id="attention"' not in page and 'id="reconstruction"' not in page
    whole, every = load_source(str(noise)), list(range(80))
    assert labels_seen(labeled, whole, "label", every) == "which training saw of 64 of these 80 pictures"
    assert (
        labels_seen({}, whole, "label", every)
        == labels_seen(labeled, whole, "kind", every)
        == ("which training did not see")
    )
    elsewhere = {**labeled, "dataset": "emoji"}
    assert "of 64 other pictures" in labels_seen(elsewhere, whole, "label", every)


def test_a_resumed_run_keeps_its_division(finished, noise, tmp_path):
    folder = finished[0]
    same = plan_of("fixmatch", "--dataset", noise, "--output_dir", folder)
    check_division(same, load_pictures(same), True)
    for flags in (["--no_evaluation"], ["--validation_fraction", "0.1"]):
        other = plan_of("fixmatch", "--dataset", noise, "--output_dir", folder, *flags)
        with pytest.raises(
            CommandError, match=r"divided its pictures otherwise \(64 train, 0 validation, 16 test; now"
        ):
            check_division(other, load_pictures(other), True)
    older = tmp_path / "older"
    older.mkdir()
    (older / "run.json").write_text(json.dumps({"steps": 4, "dataset": str(noise)}))  # it trained on all 80
    plan = plan_of("fixmatch", "--dataset", noise, "--output_dir", older)
    with pytest.raises(CommandError, match="divided its pictures otherwise"):
        check_division(plan, load_pictures(plan), True)


@pytest.fixture
def fitted(monkeypatch):
    """`fit` up to its trainer: what it would train on."""
    made = []

    class Stop(Exception):
        pass

    def stop(trainer, *args, **kwargs):
        made.append(trainer)
        raise Stop

    monkeypatch.setattr(hf_ssl.SSLTrainer, "train", stop)

    def fit(**arguments):
        with pytest.raises(Stop):
            hf_ssl.fit("resnet-pico", **arguments, image_size=12, max_steps=1, use_cpu=True, report_to=[])
        return made[-1]

    return fit


def test_fit_keeps_its_validation_apart_or_refuses(fitted, noise, caplog):
    whole = load_source(str(noise)).dataset
    with caplog.at_level(logging.WARNING, "hf_ssl"):
        trainer = fitted(labeled=whole, validation=whole.select(range(0, 80, 8)))
    scored = files(trainer.eval_queries)
    assert len(scored) == 10 and not scored & files(trainer.train_source, trainer.labeled.source)
    assert len(trainer.train_source) == 70 and len(trainer.labeled.rows.rows) == 70
    assert "10 of the 80 pictures" in caplog.text and trainer.trained_queries == 0
    assert not set(trainer.labeled.rows.rows) & set(range(0, 80, 8))  # rows of the whole
    trainer = fitted(labeled=whole.select(range(30, 50)), unlabeled=whole, validation=whole.select(range(8)))
    assert len(trainer.train_source) == 72 and len(trainer.labeled.rows.rows) == 20
    with pytest.raises(ValueError, match="so none is left to train on"):
        hf_ssl.fit("resnet-pico", labeled=whole, validation=whole)
    with pytest.raises(ValueError, match="so none is left to train on"):
        hf_ssl.fit("resnet-pico", labeled=str(noise), validation=str(noise))
    with pytest.raises(ValueError, match=r"row 8 .* is kept to validate or test on"):
        hf_ssl.fit("resnet-pico", labeled=whole, validation=whole.select(range(0, 80, 8)), label_ids=[1, 8])


def test_the_trainer_says_that_it_measures_on_what_it_trains_on(noise, tmp_path, caplog):
    from tests.training.conftest import make_trainer

    whole = load_source(str(noise))
    trainer = make_trainer(whole, tmp_path)
    assert trainer.run_record()["division"] == {"train": 80, "measured": None, "trained_on": 0}
    part = load_source(whole.dataset.select(range(70, 80)))
    processor = trainer.processing_class
    with caplog.at_level(logging.WARNING, "hf_ssl"):
        trainer = hf_ssl.SSLTrainer(trainer.method, trainer.args, whole, processor, whole, part)
    assert trainer.run_record()["division"] == {"train": 80, "measured": 10, "trained_on": 10}
    assert "10 of the 10 pictures" in caplog.text and "in the bank" not in caplog.text
    with caplog.at_level(logging.WARNING, "hf_ssl"):
        others = load_source(whole.dataset.select(range(40)))
        hf_ssl.SSLTrainer(trainer.method, trainer.args, others, processor, whole, part)
    assert "10 of the 10 pictures" in caplog.text and "are in the bank as well" in caplog.text
    queries = load_pictures(plan_of("simclr", "--dataset", noise)).pairs[0][1]  # no test split by its name
    trainer.args.load_best_model_at_end = True
    with pytest.raises(ValueError, match=r"would choose the checkpoint on the train \(held out\) images"):
        hf_ssl.SSLTrainer(trainer.method, trainer.args, whole, processor, whole, queries)
