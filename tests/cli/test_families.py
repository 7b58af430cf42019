"""train for the families that read more than pixels: labels of some images, texts of all."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline

from hf_ssl.cli import main
from hf_ssl.hub import load_method

SHORT = ["--max_steps", "4", "--logging_steps", "2", "--image_size", "16", "--use_cpu", "--disable_tqdm"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes told apart by colour, 20 training and 8 test pictures each, every one with a caption beside it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 8)):
        for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-40, 40, (20, 20, 3))
                Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
                (folder / f"{i}.txt").write_text(f"a {name} square number {i}\n")
    return root


def test_train_fixmatch_on_a_few_labels(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "fixmatch", "--dataset", pictures, "--output_dir", run, "--backbone", "resnet-pico", *SHORT]
    command += ["--labels_per_class", 2, "--unlabeled_ratio", 3, "--per_device_train_batch_size", 2]
    command += ["--validation_fraction", 0.25, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2]
    command += ["--load_best_model_at_end", "--metric_for_best_model", "accuracy"]
    assert main([str(word) for word in command]) == 0
    out = capsys.readouterr().out
    assert "30 images; 4 labels of 2 classes (2 per class)" in out
    assert "4 steps of 2 labelled and 6 unlabelled images" in out
    record = json.loads((run / "run.json").read_text())
    assert record["labeled"] == json.loads((run / "labeled_rows.json").read_text())
    assert len(record["labeled"]["rows"]) == 4 and record["labeled"]["names"] == ["blue", "red"]
    rows = {row["model"]: row for row in record["results"]}
    published = record["published"]  # after 4 steps: what is better on the validation images
    assert "on validation images" in published["why"] and f"the {published['weights']} weights are published" in out
    average = published["weights"] == "average"
    names = ["last weights", "EMA weights"] if average else ["EMA weights, not published", "last weights, published"]
    assert {"majority class", *names} <= set(rows)
    assert rows["majority class"]["accuracy"] == 0.5 and {"accuracy", "ece", "confusion"} <= set(rows[names[1]])
    method = load_method(run)[0]
    root = load_file(run / "model.safetensors")
    chosen = (method.ema if average else method.backbone).state_dict()
    assert all(torch.equal(root[name], value) for name, value in chosen.items() if name in root)
    card = (run / "README.md").read_text()
    assert "image-classification" in card and "2 per class" in card
    assert ", ".join(map(str, record["labeled"]["rows"])) in card
    classifier = AutoModelForImageClassification.from_pretrained(run)
    assert classifier.config.id2label == {0: "blue", 1: "red"}
    assert "Which classes it confuses" in (run / "report.html").read_text()


def test_train_clip_on_captions_beside_the_files(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "clip", "--dataset", pictures, "--output_dir", run, "--backbone", "vit-pico", *SHORT]
    command += ["--text_backbone", "text-pico", "--vocab_size", 600, "--context_length", 16, "--patch_size", 8]
    assert main([str(word) for word in [*command, "--per_device_train_batch_size", 8]]) == 0
    rows = {row["model"]: row for row in json.loads((run / "run.json").read_text())["results"]}
    assert {"zeroshot_label", "i2t_r1", "t2i_r10"} <= set(rows["trained"]) and "i2t_r1" in rows["chance"]
    classify = pipeline("zero-shot-image-classification", model=str(run))
    image = Image.open(next((pictures / "test" / "red").glob("*.png")))
    found = classify(image, candidate_labels=["red square", "blue square"], hypothesis_template="a {}")
    assert sum(one["score"] for one in found) == pytest.approx(1)
    assert "best-matching texts" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["simclr", "--labels_per_class", "4"], "--labels_per_class is a flag of fixmatch, not of simclr."),
        (["fixmatch", "--context_length", "16"], "--context_length is a flag of clip, not of fixmatch."),
        (["fixmatch", "--labels_per_class", "0"], "--labels_per_class must be at least 1, not '0'."),
        (["fixmatch", "--label_fraction", "2"], "--label_fraction must be from 0 to 1, not '2'."),
        (["fixmatch", "--unlabeled_ratio", "-1"], "--unlabeled_ratio must be 0 or more, not '-1'."),
    ],
)
def test_flags_of_another_family_and_bad_values_are_named(argv, sentence, capsys):
    assert main(["train", *argv]) == 2
    assert sentence in capsys.readouterr().err


def test_data_that_does_not_suit_the_family_is_named(pictures, tmp_path, capsys):
    loose = tmp_path / "loose"
    loose.mkdir()
    for i, path in enumerate(sorted(pictures.glob("train/*/*.png"))):
        (loose / f"{i}.png").write_bytes(path.read_bytes())
    output = ["--output_dir", str(tmp_path / "run"), *SHORT]
    assert main(["train", "fixmatch", "--dataset", str(loose), *output]) == 1
    assert "no label column" in capsys.readouterr().err
    assert main(["train", "clip", "--dataset", str(loose), "--overwrite", *output]) == 1
    assert "no texts to learn from" in capsys.readouterr().err
    assert (
        main(["train", "fixmatch", "--dataset", str(pictures), "--labels_per_class", "30", "--overwrite", *output])
        == 1
    )
    assert "fewer than the 30 per class" in capsys.readouterr().err


def test_a_run_that_turns_to_nan_fails_and_its_one_command_repeats_the_step(pictures, tmp_path, capsys):
    run = tmp_path / "a run"
    command = ["train", "simclr", "--dataset", pictures, "--output_dir", run, "--backbone", "resnet-pico", *SHORT]
    command += ["--per_device_train_batch_size", 8, "--optim", "sgd", "--learning_rate", "1e9", "--warmup_steps", 2]
    command += ["--max_steps", 12, "--save_steps", 1, "--save_total_limit", 1]
    assert main([str(word) for word in command]) == 1
    record, said = json.loads((run / "run.json").read_text()), capsys.readouterr().err
    assert record["finished"] is False and "NaN or infinite" in record["stopped"] and record["results"] == []
    assert not (run / "model.safetensors").exists() and not (run / "ssl").exists()
    (kept,) = run.glob("checkpoint-*")
    assert all(value.isfinite().all() for value in load_file(kept / "model.safetensors").values())
    again = said.rpartition("To see the step again: ")[2].strip().splitlines()[0]
    word, *argv = shlex.split(again)
    assert word == "hf-ssl" and main(argv) == 0
    assert "is NaN or infinite again" in (out := capsys.readouterr().out) and "rows       [{'rows': [" in out
    assert json.loads((run / "run.json").read_text()) == record and not (run / "nonfinite" / "again").exists()
