"""A user of Trainer passes what Trainer takes: each argument works, or a sentence says what to do."""

import datasets
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import hf_ssl
from hf_ssl import SSLTrainer, SSLTrainingArguments
from hf_ssl.evaluation import extract_features, predict, raw_pixels
from hf_ssl.training import ModelArguments, build_method
from tests.contract.tiny import VIT, build, pictures, processor

PICTURES, LABELS = pictures(24), [i % 3 for i in range(24)]


def table(names=("a", "b", "c")):
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    return datasets.Dataset.from_dict({"image": PICTURES, "label": LABELS}, datasets.Features(kinds))


@pytest.fixture
def images():
    return table()


@pytest.fixture
def made():
    model, views = build("simclr", VIT), processor("simclr")
    model.processor = views
    return model, views


def arguments(folder, **given):
    defaults = {
        "per_device_train_batch_size": 8, "max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "precision": "fp32", "learning_rate": 0.01,
    }  # fmt: skip
    return SSLTrainingArguments(str(folder), **{**defaults, **given})


def trained(trainer):
    before = trainer.method.backbone.embeddings.cls_token.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 2
    assert not torch.equal(before, trainer.method.backbone.embeddings.cls_token)
    return trainer


def test_a_dataset_by_place_by_trainers_name_as_a_stream_and_as_a_list_train_the_same(made, images, tmp_path):
    model, views = made
    start, losses = {name: value.clone() for name, value in model.state_dict().items()}, []
    for given in (
        lambda: SSLTrainer(model, arguments(tmp_path), images, views),
        lambda: SSLTrainer(model=model, args=arguments(tmp_path), train_dataset=images, processing_class=views),
        lambda: SSLTrainer(model, arguments(tmp_path), train_dataset=list(PICTURES)),
        lambda: SSLTrainer(model, arguments(tmp_path), train_source=hf_ssl.load_source(images)),
    ):
        model.load_state_dict(start)
        trainer = trained(given())
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.train_dataset.num_rows == 24
    assert losses[1:] == losses[:1] * 3
    assert trained(SSLTrainer(model, arguments(tmp_path), images.to_iterable_dataset(), views)).state.global_step == 2


def test_evaluate_takes_a_dataset_a_dict_and_a_name(made, images, tmp_path):
    model, _ = made
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_few_knn_top1")
    half = images.select(range(12))
    trainer = SSLTrainer(model, args, train_dataset=images, eval_dataset={"all": images, "few": half}, eval_bank=half)
    trained(trainer)
    logged = [set(entry) for entry in trainer.state.log_history]
    assert sum("eval_all_knn_top1" in entry for entry in logged) == 2
    assert set(trainer.evaluate()) == {
        f"eval_{name}_knn_{kind}" for name in ("all", "few") for kind in ("top1", "label")
    }
    assert set(trainer.evaluate("few")) == set(trainer.evaluate(half)) == {"eval_knn_top1", "eval_knn_label"}
    alone = SSLTrainer(model, arguments(tmp_path), images)  # the training images vote, if they have labels
    assert 0 <= alone.evaluate(half)["eval_knn_top1"] <= 1
    with pytest.raises(ValueError, match="needs labelled images: pass eval_dataset"):
        alone.evaluate()
    with pytest.raises(ValueError, match="none is left to vote: give other images as eval_dataset"):
        alone.evaluate(images)
    with pytest.raises(ValueError, match=r"has no labels: give eval_bank"):
        SSLTrainer(model, arguments(tmp_path), PICTURES).evaluate(images)
    with pytest.raises(ValueError, match=r"has no labels: give eval_dataset"):
        SSLTrainer(model, args, images, eval_dataset=PICTURES)


class _Count(TrainerCallback):
    steps = 0

    def on_step_end(self, *args, **kwargs):
        self.steps += 1


def test_trainers_other_arguments_work(made, images, tmp_path):
    model, _ = made
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    count = _Count()
    trainer = SSLTrainer(model, arguments(tmp_path), images, optimizers=(optimizer, schedule), callbacks=[count])
    trained(trainer)
    assert count.steps == 2 and [group["lr"] for group in optimizer.param_groups] == [0.05]
    given = (torch.optim.SGD, {"lr": 0.03, "momentum": 0.5})
    trainer = trained(SSLTrainer(model, arguments(tmp_path), images, optimizer_cls_and_kwargs=given))
    assert trainer.optimizer.optimizer.defaults["momentum"] == 0.5


@pytest.mark.parametrize(
    "name", ["data_collator", "compute_metrics", "preprocess_logits_for_metrics", "model_init", "compute_loss_func"]
)
def test_what_a_method_has_no_use_for_is_refused_in_words(name, made, images, tmp_path):
    with pytest.raises(TypeError, match=f"takes no {name}: .{{40}}"):
        SSLTrainer(made[0], arguments(tmp_path), images, **{name: len})


def test_arguments_in_each_others_place_are_said(made, images, tmp_path):
    (model, views), args = made, arguments(tmp_path)
    order = r"the order is SSLTrainer\(model, args, images, processing_class\)"
    for given, words in (
        ((args, model, images, views), f"each other's place: {order}"),
        ((model, args, views, images), f"SimCLRImageProcessor stands where the images belong: {order}"),
        ((images, args, model, views), f"SimCLRForPreTraining stands where the images belong: {order}"),
        ((model, views, images, args), "args is a SimCLRImageProcessor: give SSLTrainingArguments"),
        ((model, TrainingArguments(str(tmp_path)), images, views), "args is a TrainingArguments"),
        ((model, args, images, images), f"processing_class is a Dataset: .*{order}"),
        ((model.backbone, args, images, views), "trains a method of hf_ssl, and model is a ViTModel: build_method"),
        ((model, args), "needs images to train on: train_dataset"),
    ):
        with pytest.raises(TypeError, match=words):
            SSLTrainer(*given)
    with pytest.raises(TypeError, match="train_source and train_dataset are two names"):
        SSLTrainer(model, args, images, views, train_dataset=images)
    lars, own = arguments(tmp_path, optim="lars"), (torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(TypeError, match="optim='lars' names another"):
        SSLTrainer(model, lars, images, optimizer_cls_and_kwargs=own)
    with pytest.raises(NotImplementedError, match="extract_features"):
        SSLTrainer(model, args, images).predict(images)
    with pytest.raises(TypeError, match=r"the order is build_method\(name, images"):
        build_method("simclr", images, images)


def test_every_call_takes_a_dataset_and_a_list_of_images(made, images, tmp_path):
    model, views = build_method("fixmatch", images, ModelArguments(backbone="vit-nano", image_size=16))
    assert model.backbone.config.id2label == {0: "a", 1: "b", 2: "c"}
    args = arguments(tmp_path, per_device_train_batch_size=2)
    trainer = SSLTrainer(model, args, images, eval_dataset=images)
    assert len(trainer.labeled.rows.rows) == 24
    trainer.train()
    with pytest.raises(ValueError, match="the model's classes are a, b, c"):
        SSLTrainer(model, args, table(names=("a", "c", "b")))
    grey, one = build_method("simclr", images, ModelArguments(backbone="vit-nano", image_size=16, num_channels=1))
    SSLTrainer(grey, arguments(tmp_path, max_steps=1), images).train()
    options = {"progress": False, "device": "cpu"}
    pairs = list(zip(PICTURES, LABELS))
    native, reader = made[0].backbone, made[1]
    features = extract_features(native, images, reader, **options)
    assert torch.equal(features.embeddings, extract_features(native, PICTURES, reader, **options).embeddings)
    assert extract_features(grey.backbone, images, one, **options).embeddings.shape == (24, 192)
    assert raw_pixels(PICTURES, progress=False).embeddings.shape == (24, 32 * 32 * 3)
    table_rows = hf_ssl.evaluate_backbone(
        native, reader, images, pairs, measures=("knn",), baselines=False, k=(1,), **options
    )
    assert table_rows[0]["knn1_label"] > 0
    assert len(predict(trainer.method.ema, PICTURES, views, **options)) == 24
    report = hf_ssl.fit(
        "vit-nano", pairs[:18], PICTURES[:18], pairs[18:], image_size=16, max_steps=1, per_device_train_batch_size=2,
        unlabeled_ratio=2, use_cpu=True, disable_tqdm=True, precision="fp32",
    )  # fmt: skip
    assert len(report.labeled.rows) == 18 and 0 <= report.validation["accuracy"] <= 1
    assert len(report.pseudo_labels(PICTURES, **options)) == 24


def test_a_processor_that_draws_nothing_is_refused(images, tmp_path):
    model_args = ModelArguments(backbone="resnet-nano", image_size=16)
    model, views = build_method("simclr", images, model_args, view_fields={"count": 0})
    with pytest.raises(ValueError, match="draws no view of a picture: count must be 1 or more"):
        SSLTrainer(model, SSLTrainingArguments(str(tmp_path), report_to=[]), images, views)
