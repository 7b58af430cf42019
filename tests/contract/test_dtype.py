"""Precision of weights: float32 whatever a checkpoint's is, another where the user asks; teachers never below it."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    BertConfig,
    BertModel,
)

import hf_ssl
from hf_ssl import memory
from hf_ssl.backbones import two_towers
from hf_ssl.data import load_source
from hf_ssl.hub import export
from hf_ssl.hub.folder import check_parity
from hf_ssl.methods import METHODS, load
from hf_ssl.modeling import SSLModel
from hf_ssl.training.arguments import ModelArguments
from hf_ssl.training.build import build_method
from tests.contract import tiny
from tests.contract.tiny import RESNET, TINY, VIT, batch, build, make_config, pictures, processor, train_step

every_method = pytest.mark.parametrize("name", sorted(METHODS))
HALF = torch.bfloat16


def native_half(name: str, folder: Path, backbone: dict = VIT, dtype: torch.dtype = HALF) -> Path:
    """A native model of the method's kind as published in half precision."""
    native = AutoModel.from_config(AutoConfig.for_model(**TINY[name].native(backbone)))
    native.to(dtype).save_pretrained(folder)
    return folder


def precisions(module: nn.Module) -> set[torch.dtype]:
    return {t.dtype for t in module.state_dict().values() if t.is_floating_point()}


def follow(model: SSLModel, steps: int, momentum: float) -> float:
    """How far teachers are from a float64 reference after ``steps``, relative to the way they should have gone."""
    model.teacher_momentum = lambda progress: momentum  # type: ignore[method-assign]
    with torch.no_grad():
        for student, _ in model.teachers():
            for parameter in student.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    pairs = [pair for s, t in model.teachers() for pair in zip(s.parameters(), t.parameters(), strict=True)]
    wanted = [teacher.double().clone() for _, teacher in pairs]
    start = [each.clone() for each in wanted]
    for _ in range(steps):
        model.after_optimizer_step(0.0)
        for (student, _), reference in zip(pairs, wanted, strict=True):
            reference.lerp_(student.double(), 1 - momentum)
    off = sum(float((t.double() - w).square().sum()) for (_, t), w in zip(pairs, wanted, strict=True))
    way = sum(float((w - s).square().sum()) for w, s in zip(wanted, start, strict=True))
    return (off / way) ** 0.5


@every_method
def test_a_warm_start_from_half_precision_trains_in_float32(name: str, tmp_path) -> None:
    folder, config = native_half(name, tmp_path), make_config(name)
    config.backbone_config = AutoConfig.from_pretrained(folder, **_classes(name))  # says bfloat16
    torch.manual_seed(0)
    model = load(name).from_pretrained(folder, config=config).train()
    assert precisions(model) == {torch.float32}
    before = {key: parameter.detach().clone() for key, parameter in tiny.students(model).items()}
    train_step(model, torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0), batch(name))
    trained = {
        key: p for key, p in tiny.students(model).items() if p.grad is not None and not key.endswith("k_proj.bias")
    }
    assert not [key for key, value in trained.items() if torch.equal(value, before[key])]
    assert precisions(load(name)(config)) == {
        torch.float32
    }  # random weights from a half-precision checkpoint's config


def _classes(name: str) -> dict:
    return {"id2label": dict(enumerate("abcdefgh"[: TINY[name].classes]))} if TINY[name].classes else {}


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "f64"])
def test_another_precision_where_it_is_asked_for(name: str, dtype: torch.dtype, tmp_path) -> None:
    native_half(name, tmp_path, dtype=torch.float32)
    model = load(name).from_pretrained(tmp_path, config=make_config(name), dtype=dtype).train()
    for key, part in model.named_children():
        assert key not in ("backbone", "projector", "head", "predictor") or precisions(part) == {dtype}, key
    for _, teacher in model.teachers():
        assert precisions(teacher) == {torch.promote_types(dtype, torch.float32)}
    for part in model.modules():
        if isinstance(part, memory.State) and not list(part.parameters()):
            assert precisions(part) <= {torch.float32}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(2):
        assert train_step(model, optimizer, batch(name, seed=seed)).isfinite()


@pytest.mark.parametrize("name", ["dino", "mocov3", "moco", "fixmatch", "msn", "byol"])
@pytest.mark.parametrize("cast", ["warm", "asked", "moved"])
def test_a_teacher_follows_its_student_to_one_percent(name: str, cast: str, tmp_path) -> None:
    native_half(name, tmp_path)
    asked = {"dtype": HALF} if cast == "asked" else {}
    model = load(name).from_pretrained(tmp_path, config=make_config(name), **asked).train()
    model = model.half() if cast == "moved" else model
    assert follow(model, 200, 0.9995) < 0.01


@pytest.mark.parametrize("name", ["dino", "fixmatch", "swav", "sela_v2"])
def test_casting_a_model_leaves_teachers_and_memories_to_the_bit(name: str) -> None:
    model = build(name)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    model.to(HALF)
    steady = [f"{key}." for key, part in model.named_modules() if isinstance(part, memory.State)]
    steady += ["teacher_", "ema."]
    assert model.backbone.dtype == HALF
    for key, value in model.state_dict().items():
        assert not key.startswith(tuple(steady)) or torch.equal(value, kept[key]), key


def test_the_logit_scale_of_clip_trains(tmp_path) -> None:
    model = load("clip").from_pretrained(native_half("clip", tmp_path), config=make_config("clip")).train()
    start = model.backbone.logit_scale.item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for seed in range(5):
        train_step(model, optimizer, batch("clip", seed=seed))
    assert 2e-4 < abs(model.backbone.logit_scale.item() - start) < 1e-3  # a bfloat16 near 2.66 moves by .016 or not


def source():
    features = Features(image=Image())
    return load_source(Dataset.from_dict({"image": pictures(12)}, features=features))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_way_in(dtype: torch.dtype, tmp_path) -> None:
    """A ResNet in half precision by ``build_method``, our own run cast to it, an auto class, and both at once."""
    folder = native_half("simclr", tmp_path / "resnet", RESNET, dtype)
    fields = {"projection_dim": 8, "hidden_dim": 8}
    arguments = ModelArguments(backbone=str(folder), image_size=16)
    model, views = build_method("simclr", source(), arguments, fields)
    assert precisions(model) == {torch.float32}
    assert model.train()(**views(pictures(4), seed=0)).loss.isfinite()
    ours = copy.deepcopy(model).to(dtype)
    ours.save_pretrained(tmp_path / "run" / "ssl")
    processor("simclr").save_pretrained(tmp_path / "run" / "ssl")
    assert precisions(load("simclr").from_pretrained(tmp_path / "run")) == {torch.float32}
    assert precisions(AutoModelForPreTraining.from_pretrained(tmp_path / "run" / "ssl")) == {torch.float32}
    assert precisions(AutoModelForPreTraining.from_config(ours.config)) == {torch.float32}
    again, _ = build_method("simclr", source(), ModelArguments(backbone=str(tmp_path / "run" / "ssl"), image_size=16))
    assert precisions(again) == {torch.float32}
    asked = load("simclr").from_pretrained(tmp_path / "run", dtype="auto")
    assert precisions(asked) == {dtype}


def test_a_text_tower_in_half_precision(tmp_path) -> None:
    bert = BertConfig(vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(bert).to(HALF).save_pretrained(tmp_path)
    config = two_towers.image_text_config(AutoConfig.for_model(**VIT), tmp_path, tiny.TOKENIZER, 16, 16)
    model = load("clip")(load("clip").config_class(backbone_config=config))
    two_towers.load_tower(model.backbone, "text", tmp_path)
    assert precisions(model) == {torch.float32}
    wanted = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.backbone.text_model.state_dict().items())


def test_fit_takes_a_model_in_half_precision() -> None:
    resnet = AutoModelForImageClassification.from_config(AutoConfig.for_model(**RESNET)).to(HALF)
    features = Features(image=Image(), label=ClassLabel(names=["a", "b"]))
    labels = Dataset.from_dict({"image": pictures(12), "label": ["a", "b"] * 6}, features=features)
    report = hf_ssl.fit(
        resnet, labels, labels_per_class=2, image_size=16, max_steps=1, per_device_train_batch_size=2,
        unlabeled_ratio=1, use_cpu=True, disable_tqdm=True, report_to=[],
    )  # fmt: skip
    assert precisions(report.model) == precisions(report.method) == {torch.float32}
    assert resnet.dtype == HALF


@pytest.mark.parametrize("name", ["simclr", "fixmatch"])
def test_what_is_exported_keeps_the_wish(name: str, tmp_path) -> None:
    """float32 after a start from bfloat16; bfloat16 where it was asked for, also of a float32 teacher."""
    native = native_half(name, tmp_path / "native")
    for asked, wanted in ({}, torch.float32), ({"dtype": HALF}, HALF):
        model = load(name).from_pretrained(native, config=make_config(name), **asked)
        root = tmp_path / str(wanted)
        export(model, processor(name), root)
        loaded = AutoModel.from_pretrained(root)
        assert loaded.dtype == wanted and AutoConfig.from_pretrained(root).dtype == wanted
        check_parity(root, model, processor(name))
        AutoImageProcessor.from_pretrained(root)
