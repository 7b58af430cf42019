"""The base of semi-supervised methods: one pass, two losses, an EMA that is evaluated, warm starts, metrics."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, TimmWrapperConfig

from hf_ssl import backbones
from hf_ssl.methods.semi_supervised.fixmatch import FixMatchConfig, FixMatchForPreTraining
from hf_ssl.semi_supervised import SemiSupervisedModel, consistency, interleave_order, pseudo_label_metrics
from tests.contract.tiny import RESNET, VIT, batch, build, train_step

_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
FAMILIES = {
    "vit": {**_VIT, "intermediate_size": 32},
    "dinov2": {**_VIT, "mlp_ratio": 2},
    "resnet": {key: value for key, value in RESNET.items() if key != "model_type"},
    "convnextv2": {"hidden_sizes": [4, 6], "depths": [1, 1], "num_stages": 2, "image_size": 16},
    "swin": {
        "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 16, "patch_size": 2,
    },
    "timm_resnet": {"architecture": "test_resnet"},
    "timm_vit": {"architecture": "test_vit", "model_args": {"img_size": 32}},
}  # fmt: skip
SIZE = {"timm_vit": 32}


def native_config(family: str, classes: int = 3) -> Any:
    names = {i: f"class {i}" for i in range(classes)}
    if family.startswith("timm"):
        return TimmWrapperConfig(**FAMILIES[family], id2label=names, label2id={v: k for k, v in names.items()})
    return AutoConfig.for_model(family, **FAMILIES[family], id2label=names)


def family_model(family: str, **fields: Any) -> FixMatchForPreTraining:
    torch.manual_seed(0)
    return FixMatchForPreTraining(FixMatchConfig(backbone_config=native_config(family), threshold=0.34, **fields))


def random_batch(size: int = 16, rows: int = 4, classes: int = 3) -> dict[str, Tensor]:
    keys = {"pixel_values": rows, "weak_pixel_values": 2 * rows, "strong_pixel_values": 2 * rows}
    views = {key: torch.randn(count, 1, 3, size, size) for key, count in keys.items()}
    return {**views, "labels": torch.arange(rows) % classes}


def close(got: Tensor, wanted: Tensor) -> None:
    """Equal but for a convolution's rounding in another memory layout."""
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-8)


# --- any native classifier ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_exports_and_comes_back(family: str, tmp_path) -> None:
    model = family_model(family, ema_momentum=0.04).train()  # after a step the average is no start any more
    size = SIZE.get(family, 16)
    train_step(model, torch.optim.SGD(model.backbone.parameters(), lr=0.1), random_batch(size))
    silent = {key for key, p in model.backbone.named_parameters() if p.grad is None} - {"dinov2.embeddings.mask_token"}
    assert not silent
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        output = model.eval()(images)
        assert torch.equal(output.logits, model.ema(images).logits)
        torch.testing.assert_close(output.embeddings, model.features(images), rtol=0, atol=0)
        assert output.embeddings.shape == (2, backbones.feature_dim(model.backbone))
        model.save_pretrained(tmp_path / "ssl")
        again, report = FixMatchForPreTraining.from_pretrained(tmp_path / "ssl", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
        model.export_backbone.save_pretrained(tmp_path)
        plain = AutoModelForImageClassification.from_pretrained(tmp_path)
        close(plain(images).logits, output.logits)
        assert plain.config.id2label[1] == "class 1"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_has_its_base_models_features(family: str, tmp_path) -> None:
    classifier = AutoModelForImageClassification.from_config(native_config(family)).eval()
    classifier.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, SIZE.get(family, 16), SIZE.get(family, 16))
    with torch.no_grad():
        close(backbones.features(classifier, images), backbones.features(base, images))
        close(backbones.patch_tokens(classifier, images), backbones.patch_tokens(base, images))
        logits, features = backbones.classify(classifier, images)
        close(logits, classifier(images).logits)
        close(features, backbones.features(base, images))
        if family in ("vit", "dinov2"):
            close(backbones.last_attention(classifier, images), backbones.last_attention(base, images))
    assert backbones.feature_dim(classifier) == features.shape[1]
    before = dict(backbones.unwrap(classifier)._forward_hooks)
    backbones.classify(classifier, images)
    assert dict(backbones.unwrap(classifier)._forward_hooks) == before  # hooks do not pile up


def test_what_is_no_classifier_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="at least 2 classes, got num_labels=1"):
        FixMatchForPreTraining(FixMatchConfig(backbone_config={**VIT, "num_labels": 1}))


# --- warm starts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "resnet", "timm_resnet"])
@pytest.mark.parametrize("classes", [3, 5])
def test_warm_start_from_a_native_classifier(family: str, classes: int, tmp_path) -> None:
    """A head of the same size is kept, one of another size is drawn anew and said so; backbone and EMA are equal."""
    native = AutoModelForImageClassification.from_config(native_config(family, classes))
    native.save_pretrained(tmp_path)
    config = FixMatchConfig(backbone_config=native_config(family))
    model, report = FixMatchForPreTraining.from_pretrained(tmp_path, config=config, output_loading_info=True)
    redrawn = {key for key, *_ in report["mismatched_keys"]}
    assert bool(redrawn) == (classes != 3) and not report["missing_keys"]
    assert not model.training and int(model.step) == 0
    for key, value in native.state_dict().items():
        same = value.shape == model.backbone.state_dict()[key].shape
        assert same == (f"backbone.{key}" not in redrawn)
        assert not same or torch.equal(model.backbone.state_dict()[key], value), key
        assert torch.equal(model.ema.state_dict()[key], model.backbone.state_dict()[key])
    assert model.backbone.config.num_labels == 3 == model.train()(**random_batch()).logits.shape[1]
    assert not {p.data_ptr() for p in model.ema.parameters()} & {p.data_ptr() for p in model.backbone.parameters()}
    assert not any(p.requires_grad for p in model.ema.parameters())


def test_warm_start_keeps_the_classes_of_the_checkpoint_where_none_are_given(tmp_path) -> None:
    AutoModelForImageClassification.from_config(native_config("vit", 4)).save_pretrained(tmp_path)
    model = FixMatchForPreTraining.from_pretrained(tmp_path)
    assert model.config.backbone_config.id2label == {i: f"class {i}" for i in range(4)}


def test_warm_start_from_what_does_not_fit_is_refused_in_words(tmp_path) -> None:
    AutoModelForImageClassification.from_config(native_config("vit")).save_pretrained(tmp_path / "rgb")
    config = FixMatchConfig(backbone_config={**VIT, "num_channels": 1, "num_labels": 3})
    with pytest.raises(ValueError, match="does not fit backbone_config in the shape of vit"):
        FixMatchForPreTraining.from_pretrained(tmp_path / "rgb", config=config)
    build("simclr").save_pretrained(tmp_path / "ssl")
    with pytest.raises(ValueError, match="holds the method 'simclr': start from the run folder itself"):
        FixMatchForPreTraining.from_pretrained(tmp_path / "ssl", config=config)


# --- one pass -----------------------------------------------------------------------------------------------------


def test_interleaving_reads_a_table_by_columns() -> None:
    assert interleave_order(6, 2).tolist() == [0, 3, 1, 4, 2, 5]  # 2 labelled, 2 weak, 2 strong
    assert torch.equal(interleave_order(28, 4), torch.arange(28).view(4, 7).T.flatten())
    for rows, groups in ((11, 4), (3, 5), (1, 1)):  # counts that do not divide
        assert sorted(interleave_order(rows, groups).tolist()) == list(range(rows))


def reference(model: Any, views: dict[str, Tensor]) -> Tensor:
    """FixMatch's loss in plain words: one native pass over all rows with everything in the graph."""
    parts = [views[key].flatten(0, 1) for key in ("pixel_values", "weak_pixel_values", "strong_pixel_values")]
    x, w, s = model.backbone(torch.cat(parts)).logits.split([len(part) for part in parts])
    confidence, guess = w.detach().softmax(-1).max(-1)
    unlabeled = (F.cross_entropy(s, guess, reduction="none") * (confidence >= model.config.threshold)).sum() / len(s)
    return F.cross_entropy(x, views["labels"]) + model.config.unlabeled_weight * unlabeled


@pytest.mark.parametrize(("family", "backbone"), [("vit", VIT), ("resnet", RESNET)])
def test_loss_gradient_and_statistics_are_those_of_one_plain_pass(family: str, backbone: dict) -> None:
    """The weak rows of a network without BatchNorm skip their backward pass: no number changes."""
    wanted, model = (build("fixmatch", backbone, threshold=0.27, unlabeled_weight=2.5) for _ in range(2))
    views = batch("fixmatch")
    losses = [reference(wanted, views), model(**views).loss]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for (key, mine), want in zip(model.backbone.named_parameters(), wanted.backbone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, want.grad, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: key + text)
    for mine, want in zip(model.backbone.buffers(), wanted.backbone.buffers(), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-6)


def test_batchnorm_sees_labelled_weak_and_strong_images_at_once() -> None:
    model, views = build("fixmatch", RESNET), batch("fixmatch")
    norm = next(module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**views)
    assert [len(x) for x in seen] == [4 + 8 + 8]
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[0].mean((0, 2, 3)))


def test_logits_and_embeddings_return_to_their_rows() -> None:
    model, views = build("fixmatch", RESNET), batch("fixmatch")
    for module in model.backbone.modules():  # fixed statistics: a row's output no longer depends on the others
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    output = model(**views)
    rows = torch.cat([views["pixel_values"], views["weak_pixel_values"]]).flatten(0, 1)
    logits, features = backbones.classify(model.backbone, rows)
    torch.testing.assert_close(output.logits, logits[:4])
    torch.testing.assert_close(output.embeddings, features)
    assert not output.embeddings.requires_grad


@pytest.mark.parametrize("backbone", [VIT, RESNET])
def test_no_gradient_reaches_the_weak_branch(backbone: dict) -> None:
    """Soft targets would carry one; BatchNorm's statistics, which carry one by right, are fixed here."""
    model, views = build("fixmatch", backbone, temperature=0.5), batch("fixmatch")
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for key in ("weak_pixel_values", "strong_pixel_values"):
        views[key].requires_grad_()
    model(**views).loss.backward()
    weak = views["weak_pixel_values"].grad
    assert weak is None or not weak.any()
    assert views["strong_pixel_values"].grad.abs().sum() > 0  # the student's own pass, not a frozen one


def test_several_views_average() -> None:
    model, views = build("fixmatch"), batch("fixmatch")
    answer = torch.eye(4)[torch.arange(8) % 4], torch.arange(8.0) / 8  # each must meet the views of its own image
    model.targets = lambda logits, index: answer
    loss = model(**views).loss
    twice = {
        k: v.repeat_interleave(2, 1) if k in ("pixel_values", "strong_pixel_values") else v for k, v in views.items()
    }
    torch.testing.assert_close(model(**twice).loss, loss)
    with pytest.raises(ValueError, match="one weak view, got 2"):
        model(**{**views, "weak_pixel_values": views["weak_pixel_values"].repeat(1, 2, 1, 1, 1)})


def test_without_unlabelled_images_it_is_the_supervised_baseline() -> None:
    model, views = build("fixmatch"), batch("fixmatch")
    output = model(pixel_values=views["pixel_values"], labels=views["labels"])
    native = model.backbone(views["pixel_values"].flatten(0, 1), labels=views["labels"])
    torch.testing.assert_close(output.loss, native.loss)
    assert list(output.metrics) == ["supervised_loss"] and torch.equal(output.logits, native.logits)


@pytest.mark.parametrize("lost", ["labels", "weak_pixel_values", "strong_pixel_values"])
def test_half_a_batch_is_refused_in_words(lost: str) -> None:
    views = batch("fixmatch")
    del views[lost]
    with pytest.raises(ValueError, match="a training batch needs labels"):
        build("fixmatch")(**views)


# --- the unlabelled loss ------------------------------------------------------------------------------------------


def test_consistency_divides_by_all_rows() -> None:
    logits, targets = torch.randn(4, 3), torch.eye(3)[[0, 2, 1, 0]]
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0])
    log_p = logits.log_softmax(-1)
    by_hand = -(1.0 * log_p[0, 0] + 0.5 * log_p[2, 1]) / 4
    torch.testing.assert_close(consistency(logits, targets, weights), by_hand)
    soft = torch.randn(4, 3).softmax(-1)
    torch.testing.assert_close(consistency(logits, soft, torch.ones(4)), -(soft * log_p).sum() / 4)
    nothing = consistency(logits.requires_grad_(), targets, torch.zeros(4))
    assert nothing == 0 and not torch.autograd.grad(nothing, logits)[0].any()


def test_metrics_by_hand() -> None:
    targets = torch.eye(3)[[0, 0, 1, 2, 2]]
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    truth = torch.tensor([0, -1, 2, 2, 2])  # right, unknown, wrong; the last two are not kept
    metrics = pseudo_label_metrics(targets, weights, truth)
    assert float(metrics["utilisation"]) == pytest.approx(0.6)
    assert metrics["pseudo_label_histogram"].tolist() == pytest.approx([0.4, 0.2, 0.0])
    assert float(metrics["kept_known"]) == pytest.approx(0.4) and float(metrics["kept_correct"]) == pytest.approx(0.2)
    assert set(pseudo_label_metrics(targets, weights, None)) == {"utilisation", "pseudo_label_histogram"}


def test_logged_accuracy_is_over_the_whole_window_and_absent_where_nothing_was_kept() -> None:
    """Window: one batch keeps 1 of 4 and is wrong, one keeps 3 of 4 and is right: 3/4, not the mean of 0 and 1."""
    model = build("fixmatch")
    means = {"unlabeled_loss": 0.7, "kept_known": (0.25 + 0.75) / 2, "kept_correct": (0.0 + 0.75) / 2}
    assert model.log_metrics(means) == {"unlabeled_loss": 0.7, "pseudo_label_accuracy": 0.75}
    assert model.log_metrics({**means, "kept_known": 0.0, "kept_correct": 0.0}) == {"unlabeled_loss": 0.7}
    assert model.log_metrics({"supervised_loss": 1.0}) == {"supervised_loss": 1.0}


def test_true_labels_of_unlabelled_images_touch_no_loss() -> None:
    views = batch("fixmatch")
    model = build("fixmatch")
    guided = model(**{**views, "unlabeled_labels": torch.zeros_like(views["unlabeled_labels"])}).loss
    assert torch.equal(guided, model(**views).loss)


# --- the moving average -------------------------------------------------------------------------------------------


def test_the_average_covers_batchnorm_and_is_what_evaluation_uses() -> None:
    """Trap: an EMA that leaves BatchNorm's statistics at 0 and 1 while evaluation normalises with them."""
    model = build("fixmatch", RESNET, ema_momentum=0.25)
    optimizer = torch.optim.SGD(model.backbone.parameters(), lr=0.1)
    wanted = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    for seed in range(3):
        train_step(model, optimizer, batch("fixmatch", seed=seed))
        for key, value in model.backbone.state_dict().items():
            wanted[key] = 0.25 * wanted[key] + 0.75 * value if value.is_floating_point() else value.clone()
    statistics = [key for key in wanted if "running" in key]
    assert statistics and any((wanted[key] - wanted[key].round()).abs().max() > 1e-3 for key in statistics)
    for key, value in model.ema.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: key + text)
    images = torch.randn(2, 3, 16, 16)
    native = AutoModelForImageClassification.from_config(model.config.backbone_config)
    native.load_state_dict(wanted)
    with torch.no_grad():
        logits = native.eval()(images).logits
        for mode in (False, True):
            torch.testing.assert_close(model.train(mode)(images).logits, logits, rtol=1e-4, atol=1e-5)
    assert model.export_backbone is model.ema


def test_the_average_never_runs_in_training_mode() -> None:
    model = build("fixmatch", RESNET)
    before = {key: value.clone() for key, value in model.ema.state_dict().items()}
    assert not any(module.training for module in model.ema.modules()) and model.backbone.training
    model(**batch("fixmatch")).loss.backward()
    model(torch.randn(2, 3, 16, 16))
    assert all(torch.equal(value, before[key]) for key, value in model.ema.state_dict().items())


# --- methods to come ----------------------------------------------------------------------------------------------


class CountedMatch(FixMatchForPreTraining):
    """The shape of FlexMatch and SoftMatch: state per image and per class, soft weights, a term on the strong view."""

    def add_parts(self, config: FixMatchConfig) -> None:
        super().add_parts(config)
        self.seen = nn.Buffer(torch.zeros(16, dtype=torch.int64))
        self.mean = nn.Buffer(torch.full((config.backbone_config.num_labels,), 0.25))

    def targets(self, logits: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert index is not None and not logits.requires_grad
        self.seen.index_add_(0, index, torch.ones_like(index))
        self.mean.lerp_(logits.softmax(-1).mean(0), 0.5)
        targets, _ = super().targets(logits)
        return targets, (logits.softmax(-1) / self.mean).amax(-1).clamp(max=1.0)

    def unlabeled_loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return super().unlabeled_loss(logits, targets, weights) - 0.1 * logits.softmax(-1).mean(0).log().mean()


def test_a_method_with_state_per_image_fits_on_top(tmp_path) -> None:
    model = CountedMatch(build("fixmatch").config).train()
    assert issubclass(CountedMatch, SemiSupervisedModel)
    train_step(model, torch.optim.SGD(model.backbone.parameters(), lr=0.1), batch("fixmatch"))
    assert model.seen.tolist() == [1] * 8 + [0] * 8
    model.save_pretrained(tmp_path)
    again = CountedMatch.from_pretrained(tmp_path)
    assert torch.equal(again.seen, model.seen) and torch.equal(again.mean, model.mean)
    assert torch.equal(again.ema.classifier.weight, model.ema.classifier.weight)
