"""What a method asks of the trainer: row numbers, from one stream or two, and health judged by what it logs."""

import logging
import math

import pytest
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import ResNetConfig

from hf_ssl import FixMatchConfig, FixMatchForPreTraining, SimCLRForPreTraining, SSLTrainer, SSLTrainingArguments
from hf_ssl.data.labels import LabeledImages, draw_labeled
from hf_ssl.evaluation.health import entropy_shares
from hf_ssl.losses import target_entropies
from hf_ssl.methods import load
from tests.contract.tiny import build, processor

from .conftest import BACKBONE

ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "health_steps": 1,
}


@strict
class NumberedConfig(FixMatchConfig):
    model_type = "ssl_numbered"

    num_examples: int = 96


class NumberedMatch(FixMatchForPreTraining):
    """FlexMatch's shape: it remembers something of every unlabelled image."""

    needs_index = True

    def add_parts(self, config: NumberedConfig) -> None:
        super().add_parts(config)
        self.seen = nn.Buffer(torch.zeros(config.num_examples, dtype=torch.int64))

    def targets(self, logits: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert index is not None
        self.seen.index_add_(0, index, torch.ones_like(index))
        return super().targets(logits, index)


def numbered(source, folder, examples: int) -> SSLTrainer:
    labeled, rows = draw_labeled(source, "subgroup", fraction=0.25)
    backbone = ResNetConfig(**BACKBONE, id2label=dict(enumerate(rows.names)))
    model = NumberedMatch(NumberedConfig(backbone_config=backbone, num_examples=examples))
    return SSLTrainer(
        model, SSLTrainingArguments(str(folder), max_steps=8, learning_rate=0.01, save_strategy="no", **ARGUMENTS),
        source, load("fixmatch").processor_class(size=16), labeled=LabeledImages(labeled, rows, 3),
    )  # fmt: skip


def test_row_numbers_of_the_unlabelled_stream(tmp_path, pictures) -> None:
    """Eight steps of twelve: every one of 96 unlabelled images once, by its number; a number too many is named."""
    trainer = numbered(pictures, tmp_path, 96)
    trainer.train()
    assert trainer.method.seen.tolist() == [1] * 96
    with pytest.raises(ValueError, match=r"num_examples=\d+ training images"):
        numbered(pictures, tmp_path, 10).train()


class Judged(SimCLRForPreTraining):
    """It logs a teacher's entropies, of three answers, and its config has no out_dim."""

    with_limit = True
    peak = 0.0

    def objective(self, embeddings: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().objective(embeddings, pixel_values)
        answers = torch.tensor([self.peak, 0.0, 0.0]).softmax(0).expand(4, -1)
        found = target_entropies(answers)
        if not self.with_limit:
            found = {"teacher_entropy": found["teacher_entropy"]}
        return loss, metrics | found


@pytest.mark.parametrize(
    ("peak", "with_limit", "words"),
    [(0.0, True, "nearly uniform (entropy 1.00 of log K)"), (9.0, True, "same teacher output"), (0.0, False, None)],
)
def test_health_judges_entropy_by_its_own_scale(tmp_path, pictures, caplog, peak, with_limit, words) -> None:
    model = Judged(build("simclr").config)
    model.peak, model.with_limit = peak, with_limit
    arguments = SSLTrainingArguments(str(tmp_path), max_steps=5, save_strategy="no", logging_steps=1, **ARGUMENTS)
    trainer = SSLTrainer(model, arguments, pictures, processor("simclr"))
    with caplog.at_level(logging.WARNING, "hf_ssl.training"):
        trainer.train()
    said = " ".join(record.message for record in caplog.records)
    assert (words in said) if words else "teacher" not in said
    assert trainer.state.log_history[0]["teacher_entropy"] == pytest.approx(
        float(target_entropies(torch.tensor([[peak, 0.0, 0.0]]).softmax(1))["teacher_entropy"])
    )


def test_shares_of_the_largest_entropy() -> None:
    metrics = target_entropies(torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]))
    assert float(metrics["uniform_entropy"]) == pytest.approx(math.log(4))
    assert entropy_shares(metrics) == pytest.approx({"entropy": 0.5, "marginal_entropy": 1.0})
    assert entropy_shares({"teacher_entropy": 1.0}) == {}
