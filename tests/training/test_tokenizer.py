"""A trained tokenizer is a function of the texts: the same in every run, order and process, and read on resume."""

import dataclasses
import hashlib
import random
import signal

import pytest

from hf_ssl import SSLTrainer, SSLTrainingArguments
from hf_ssl.processing import tokenizers
from hf_ssl.training import ModelArguments, TextArguments, build
from hf_ssl.training.trainer import last_complete_checkpoint

from .conftest import in_child
from .test_resume import KillAt

TEXTS = TextArguments(text_backbone="text-pico", vocab_size=600, context_length=16, projection_dim=16)
FEW = "abcdefgh"  # letters: nearly every pair of them is as frequent as many others


def words(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join("".join(draw.choices(FEW, k=draw.randint(1, 8))) for _ in range(5)) for _ in range(count)]


@pytest.mark.parametrize("count", [20, 300])
def test_the_same_texts_in_any_order_give_the_same_tokenizer(count: int) -> None:
    found = set()
    for order in range(6):
        texts = words(0, count)
        random.Random(order).shuffle(texts)
        found.add(tokenizers.train_tokenizer(texts, 900, 16).backend_tokenizer.to_str())
    assert len(found) == 1


def test_ties_go_by_the_letters() -> None:
    """ab to gh are equally frequent, within words and at their end: lower letters first, then the end of the word."""
    tokenizer = tokenizers.train_tokenizer(["ghz efz cdz abz gh ef cd ab"] * 3, 520, 16)
    merged = sorted((number, token) for token, number in tokenizer.get_vocab().items() if 512 <= number < 518)
    assert [token for _, token in merged] == ["ab</w>", "ab", "cd</w>", "cd", "ef</w>", "ef"]


def train_clip(source, folder, resume=None, kill=None) -> None:
    model_args = ModelArguments(backbone="vit-pico", image_size=16)
    model, processor = build.build_method("clip", source, model_args, kind_args=TEXTS, resume=resume)
    args = SSLTrainingArguments(
        str(folder), per_device_train_batch_size=16, max_steps=3, save_steps=1, learning_rate=1e-3, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SSLTrainer(model, args, source, processor)
    if kill is not None:
        trainer.add_callback(KillAt(kill))
    trainer.train(resume_from_checkpoint=resume)


def digests(folder) -> dict[str, str]:
    names = ("tokenizer.json", "model.safetensors", "preprocessor_config.json")
    return {name: hashlib.sha256((folder / "checkpoint-3" / name).read_bytes()).hexdigest() for name in names}


def test_three_runs_and_a_killed_one_write_the_same_bytes(pictures, tmp_path, monkeypatch) -> None:
    dataset = pictures.dataset.remove_columns("name").add_column("name", words(0, len(pictures.dataset)))
    pictures = dataclasses.replace(pictures, dataset=dataset)
    for name in "abc":
        train_clip(pictures, tmp_path / name)
    assert in_child(lambda: train_clip(pictures, tmp_path / "killed", kill=2)) == -signal.SIGKILL
    last = last_complete_checkpoint(tmp_path / "killed")
    fewer = dataclasses.replace(pictures, dataset=pictures.dataset.select(range(40)))
    with pytest.raises(
        ValueError, match="tokenizer: another vocabulary"
    ):  # one trained on other texts: ids would change meaning
        trainer_of(fewer, tmp_path / "killed").train(resume_from_checkpoint=last)
    for name, number in (("vocab_size", 601), ("context_length", 20)):
        other = dataclasses.replace(TEXTS, **{name: number})
        with pytest.raises(ValueError, match=f"{name} {getattr(TEXTS, name)} in the checkpoint and {number} here"):
            build.build_method("clip", pictures, kind_args=other, resume=last)
    monkeypatch.setattr(tokenizers, "train_tokenizer", None)  # the checkpoint holds it: nothing is left to train
    train_clip(pictures, tmp_path / "killed", resume=last)
    first, *others = [digests(tmp_path / name) for name in ("a", "b", "c", "killed")]
    assert all(other == first for other in others)


def trainer_of(source, folder) -> SSLTrainer:
    model, processor = build.build_method(
        "clip", source, ModelArguments(backbone="vit-pico", image_size=16), kind_args=TEXTS
    )
    return SSLTrainer(model, SSLTrainingArguments(str(folder), report_to=[], use_cpu=True), source, processor)
