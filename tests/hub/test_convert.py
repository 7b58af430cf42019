"""Checkpoints in the names of official code, timm and torchvision: what is converted, refused, left out and said."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from hf_ssl.cli import main
from hf_ssl.hub import convert_checkpoint, load_method
from hf_ssl.hub.official import OFFICIAL
from hf_ssl.hub.wholes import MAKERS
from tests.hub.official_files import dino_file, dino_head, mlp, prefixed, resnet, state, training_state, vit


@torch.no_grad()
def features(folder: Path, side: int = 32, channels: int = 3) -> tuple[Tensor, Tensor]:
    """(random pictures, what plain AutoModel makes of them)."""
    AutoImageProcessor.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    pictures = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))
    outputs = model(pictures)
    kind = model.config.model_type
    if kind == "resnet":
        return pictures, outputs.pooler_output.flatten(1)
    return pictures, outputs.last_hidden_state.mean(1) if kind == "ijepa" else outputs.last_hidden_state[:, 0]


def same(got: Tensor, want: Tensor) -> None:
    scale = float(want.detach().abs().max())
    torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-5 * max(scale, 1.0))
    assert want.std() > 1e-3


# --- every method's files -----------------------------------------------------------------------------------------


def resnet_file(method: str, net: nn.Module) -> dict[str, Any]:
    """A file as the method's official code saves it: names, wrappers and what lies beside the backbone."""
    own, other = state(net), state(resnet())
    queue = {"module.queue": torch.zeros(8, 16), "module.queue_ptr": torch.zeros(1)}
    if method == "moco_v2":
        head = prefixed("module.encoder_q.fc.", state(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))))
        copies = prefixed("module.encoder_q.", own) | prefixed("module.encoder_k.", other)
        return {"arch": "resnet50", "state_dict": copies | head | queue, **training_state()}
    if method == "moco_v3":
        copies = prefixed("module.base_encoder.", own) | prefixed("module.momentum_encoder.", other)
        head = prefixed("module.base_encoder.fc.", state(mlp(8, 8, 4))) | prefixed(
            "module.predictor.", state(mlp(4, 8, 4))
        )
        return {"arch": "resnet50", "state_dict": copies | head, **training_state()}
    if method == "swav":
        head = prefixed("module.projection_head.", state(mlp(8, 8, 4))) | {
            "module.prototypes.weight": torch.ones(3, 4)
        }
        return prefixed("module.", own) | head
    if method in ("barlow_twins", "vicreg"):
        last = nn.Sequential(*mlp(8, 8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
        head = prefixed("module.projector.", state(last))
        head |= prefixed("module.bn.", state(nn.BatchNorm1d(8, affine=False))) if method == "barlow_twins" else {}
        return {"model": prefixed("module.backbone.", own) | head, **training_state()}
    assert method == "dino"
    student = prefixed("module.backbone.", other) | prefixed("module.head.", dino_head(2048))
    teacher = prefixed("backbone.", own) | prefixed("head.", dino_head(2048))
    return {"student": student, "teacher": teacher, "dino_loss": {"center": torch.rand(1, 12)}, **training_state()}


def accounted(folder: Path, tensors: int) -> dict[str, Any]:
    """conversion.json, after checking that it names as many tensors as the file holds."""
    report = json.loads((folder / "conversion.json").read_text())
    left = [name for name, why in report["left_out"].items() if not why.startswith("no weights")]
    assert len(report["converted"]) + len(left) == tensors, (len(report["converted"]), left)
    return report


def count(found: Any) -> int:
    if isinstance(found, dict):
        return sum(count(value) for key, value in found.items() if key not in ("optimizer", "opt"))
    return int(isinstance(found, Tensor))


@pytest.mark.parametrize("method", ["moco_v2", "moco_v3", "swav", "barlow_twins", "vicreg", "dino"])
def test_a_resnet_of_every_method(method: str, tmp_path: Path) -> None:
    """Found by its names, converted with torchvision's features, the rest listed; the bare backbone too."""
    net = resnet()
    found = resnet_file(method, net)
    torch.save(found, tmp_path / "whole.pth")
    done = convert_checkpoint(tmp_path / "whole.pth", tmp_path / "whole")
    assert done.method == method and done.whole == (method in MAKERS)
    pictures, got = features(tmp_path / "whole", 64)
    same(got, net(pictures))
    report = accounted(tmp_path / "whole", count(found))
    assert method == "swav" or {"optimizer.state", "epoch"} <= set(report["left_out"])
    assert f"- {method}" in (tmp_path / "whole" / "README.md").read_text()


def test_the_bare_resnet_of_a_release(tmp_path: Path) -> None:
    """resnet50.pth of Barlow Twins and VICReg, dino_resnet50_pretrain.pth: torchvision's names and nothing else."""
    net = resnet("BasicBlock")
    torch.save(state(net), tmp_path / "resnet.pth")
    done = convert_checkpoint(tmp_path / "resnet.pth", tmp_path / "out", method="vicreg")
    assert not done.whole and done.left_out == {} and done.root == ""
    pictures, got = features(tmp_path / "out", 64)
    same(got, net(pictures))


@pytest.mark.parametrize("which", [None, "student", "teacher"])
def test_one_of_two_copies(which: str | None, tmp_path: Path) -> None:
    base, average = vit(), vit()
    found = {
        "state_dict": prefixed("module.base_encoder.", state(base))
        | prefixed("module.momentum_encoder.", state(average))
    }
    torch.save(found, tmp_path / "moco.pth.tar")
    done = convert_checkpoint(tmp_path / "moco.pth.tar", tmp_path / "out", "moco_v3", which)
    pictures, got = features(tmp_path / "out")
    same(got, (average if which == "teacher" else base)(pictures))  # linear evaluation loads base_encoder
    assert {why for why in done.left_out.values()} == {
        f"another copy of the backbone, {'base_encoder' if which == 'teacher' else 'momentum_encoder'}"
    }


def test_moco_v3_small_has_twelve_heads(tmp_path: Path) -> None:
    net = vit(embed_dim=384, depth=1, num_heads=12)
    torch.save({"state_dict": prefixed("module.base_encoder.", state(net))}, tmp_path / "small.pth")
    done = convert_checkpoint(tmp_path / "small.pth", tmp_path / "out")
    pictures, got = features(tmp_path / "out")
    same(got, net(pictures))
    assert "12 attention heads assumed" in done.notes[0]


# --- whole methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [None, "student"])
def test_dino_comes_back_whole(which: str | None, tmp_path: Path) -> None:
    student, teacher = vit(), vit()
    found = dino_file(student, teacher, norm_last_layer=False, teacher_temp=0.07, momentum_teacher=0.9995)
    torch.save(found, tmp_path / "checkpoint.pth")
    done = convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "out", which=which)
    assert done.method == "dino" and done.whole
    pictures, got = features(tmp_path / "out")
    same(got, (student if which else teacher)(pictures))
    model, processor = load_method(tmp_path / "out")
    config: Any = model.config
    assert (config.norm_last_layer, config.teacher_temperature, config.teacher_momentum) == (False, 0.07, 0.9995)
    assert processor.size == {"height": 32, "width": 32}
    own: Any = model.eval()
    with torch.no_grad():
        same(own.teacher_backbone(pictures).last_hidden_state[:, 0], teacher(pictures))
        same(own.backbone(pictures).last_hidden_state[:, 0], student(pictures))
        for ours, theirs in ((own.head, found["student"]), (own.teacher_head, found["teacher"])):
            head = {name.partition("head.")[2]: t for name, t in theirs.items() if "head." in name}
            x = torch.randn(3, 128)
            hidden = nn.functional.gelu(nn.functional.linear(x, head["mlp.0.weight"], head["mlp.0.bias"]))
            hidden = nn.functional.gelu(nn.functional.linear(hidden, head["mlp.2.weight"], head["mlp.2.bias"]))
            hidden = nn.functional.linear(hidden, head["mlp.4.weight"], head["mlp.4.bias"])
            last = torch._weight_norm(head["last_layer.weight_v"], head["last_layer.weight_g"], 0)
            same(ours(x), nn.functional.normalize(hidden, dim=-1) @ last.T)
    assert torch.equal(own.center.value, found["dino_loss"]["center"])
    report = accounted(tmp_path / "out", count(found))
    assert {"args", "fp16_scaler.scale", "epoch"} <= set(report["left_out"])
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"somebody" not in file.read_bytes(), f"{file} holds a path of the authors' machine"


def test_simclr_comes_back_whole_with_its_projector(tmp_path: Path) -> None:
    """lightly's names; the linear layers' biases move into the BatchNorm behind them."""
    net, head = resnet(), mlp(2048, 32, 16)
    for tensor in head.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1.0)
    with torch.no_grad():
        head[4].bias.zero_()
    numbered = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    backbone = {f"{numbered[n.split('.')[0]]}.{n.partition('.')[2]}": t for n, t in state(net).items()}
    found = prefixed("backbone.", backbone) | prefixed("projection_head.layers.", state(head))
    torch.save({"state_dict": found}, tmp_path / "lightly.ckpt")
    done = convert_checkpoint(tmp_path / "lightly.ckpt", tmp_path / "out")
    assert done.method == "simclr" and done.whole
    pictures, got = features(tmp_path / "out", 64)
    same(got, net(pictures))
    model: Any = load_method(tmp_path / "out")[0].eval()
    with torch.no_grad():
        same(model.projector(got), head.eval()(net(pictures)))
    accounted(tmp_path / "out", len(found))


def test_a_projector_that_simclr_has_not_is_left_out(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(2048, 8), nn.ReLU(), nn.Linear(8, 4))
    found = prefixed("backbone.", state(resnet())) | prefixed("projector.", state(plain))
    torch.save(found, tmp_path / "solo.pth")
    done = convert_checkpoint(tmp_path / "solo.pth", tmp_path / "out", "simclr")
    assert not done.whole and not (tmp_path / "out" / "ssl").exists()
    assert "no ssl/" in done.notes[0] and {name for name in done.left_out} == {n for n in found if "projector" in n}


# --- backbones ----------------------------------------------------------------------------------------------------


def test_dinov2_with_the_authors_names(tmp_path: Path) -> None:
    """Chunked blocks, mask and register tokens; the oracle is timm, which reads the same official file."""
    official = state(vit(init_values=1e-2, reg_tokens=3, no_embed_class=False))
    official["register_tokens"] = official.pop("reg_token")
    official["pos_embed"] = torch.randn(1, 17, 128)
    official["mask_token"] = torch.zeros(1, 128)
    oracle = vit(init_values=1e-2, reg_tokens=3, no_embed_class=True)
    oracle.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(official), oracle))
    chunked = {
        n.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): t for n, t in official.items()
    }
    teacher = prefixed("backbone.", chunked) | prefixed("dino_head.", dino_head(128))
    files = {"release": official, "training": {"teacher": teacher}}
    for name, found in files.items():
        torch.save(found, tmp_path / f"{name}.pth")
        done = convert_checkpoint(tmp_path / f"{name}.pth", tmp_path / name)
        assert done.method == "dinov2" and "3 registers" in done.about
        pictures, got = features(tmp_path / name)
        same(got, oracle(pictures))
    assert AutoConfig.from_pretrained(tmp_path / "release").model_type == "dinov2_with_registers"


def test_dinov2_giant_has_gates(tmp_path: Path) -> None:
    from timm.layers import SwiGLUPacked

    oracle = vit(init_values=1e-2, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=5.375)
    official = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): t for n, t in state(oracle).items()}
    official["mask_token"] = torch.zeros(1, 128)
    torch.save(official, tmp_path / "giant.pth")
    convert_checkpoint(tmp_path / "giant.pth", tmp_path / "out", "dinov2")
    pictures, got = features(tmp_path / "out")
    same(got, oracle(pictures))


@pytest.mark.parametrize("kind", ["ibot", "ijepa", "deit3", "no bias", "4 channels"])
def test_vits_of_every_kind(kind: str, tmp_path: Path) -> None:
    options = {
        "ijepa": {"class_token": False, "global_pool": "avg", "fc_norm": False},
        "deit3": {"init_values": 1e-2, "no_embed_class": True},
        "no bias": {"qkv_bias": False},
        "4 channels": {"in_chans": 4, "embed_dim": 96, "num_heads": 3},
    }.get(kind, {})
    net = vit(**options)
    found: dict[str, Any] = state(net)
    if kind == "ibot":
        student = prefixed("module.backbone.", state(vit()) | {"masked_embed": torch.zeros(1, 128)})
        found = {"teacher": prefixed("backbone.", found), "student": student}
    elif kind == "ijepa":
        found = {"encoder": prefixed("module.", state(vit(**options))), "target_encoder": prefixed("module.", found)}
        found["predictor"] = {"module.predictor_embed.weight": torch.zeros(4, 128)}
    torch.save(found, tmp_path / "vit.pth")
    heads = 3 if kind == "4 channels" else None
    done = convert_checkpoint(tmp_path / "vit.pth", tmp_path / "out", num_heads=heads)
    assert done.method == (kind if kind in OFFICIAL else "backbone")
    pictures, got = features(tmp_path / "out", channels=4 if kind == "4 channels" else 3)
    same(got, net(pictures))
    accounted(tmp_path / "out", count(found))


def test_classifiers_of_timm_and_torchvision(tmp_path: Path) -> None:
    """A supervised checkpoint keeps its classifier; AutoModel reads the backbone in it."""
    nets = {
        "timm_vit": vit(num_classes=5),
        "torchvision_vit": torchvision.models.VisionTransformer(32, 8, 2, 2, 128, 256, num_classes=5).eval(),
        "torchvision_resnet": resnet(classes=5),
        "timm_resnet": timm.create_model("resnet18", num_classes=5).eval(),
    }
    nn.init.normal_(nets["torchvision_vit"].heads.head.weight)
    for name, net in nets.items():
        save_file(state(net), tmp_path / f"{name}.safetensors")
        done = convert_checkpoint(tmp_path / f"{name}.safetensors", tmp_path / name)
        assert done.method == "backbone" and "a classifier of 5 classes" in done.about and not done.left_out
        pictures, _ = features(tmp_path / name)
        model = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        with torch.no_grad():
            same(model(pictures).logits, net(pictures))


def test_an_average_beside_the_weights(tmp_path: Path) -> None:
    """timm's training checkpoints: the weights by default, the moving average on request, half precision cast."""
    net, average = vit(), vit()
    halves = {name: tensor.half() for name, tensor in state(net).items()}
    torch.save({"state_dict": halves, "state_dict_ema": state(average), "metric": 0.8}, tmp_path / "last.pth.tar")
    done = convert_checkpoint(tmp_path / "last.pth.tar", tmp_path / "plain", "backbone")
    assert any("float16" in note and "float32" in note for note in done.notes)
    model = AutoModel.from_pretrained(tmp_path / "plain")
    assert model.dtype == torch.float32
    torch.testing.assert_close(model.embeddings.cls_token, halves["cls_token"].float())
    convert_checkpoint(tmp_path / "last.pth.tar", tmp_path / "ema", which="teacher")
    pictures, got = features(tmp_path / "ema")
    same(got, average(pictures))


def test_a_grid_that_is_no_square(tmp_path: Path) -> None:
    net = vit(img_size=(32, 64))
    torch.save(state(net), tmp_path / "wide.pth", _use_new_zipfile_serialization=False)  # as torch saved before 1.6
    argv = ["convert", str(tmp_path / "wide.pth"), "--output", str(tmp_path / "out")]
    assert main([*argv, "--image_size", "32,64", "--image_mean", "0.5,0.5,0.5", "--image_std", "0.5,0.5,0.5"]) == 0
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    pictures = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        same(model(pictures).last_hidden_state[:, 0], net(pictures))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == [0.5] * 3
    assert (
        torch.Size((3, 32, 64))
        == processor(torch.zeros(3, 50, 90).byte(), return_tensors="pt")["pixel_values"][0].shape
    )


# --- what no tensor tells -------------------------------------------------------------------------------------------


def test_eps_and_activation_are_asked_for_or_stated(tmp_path: Path) -> None:
    """A ViT of another eps and activation: wrong features and a word for each without the flags, right ones with."""
    net = vit(norm_layer=partial(nn.LayerNorm, eps=1e-2), act_layer=partial(nn.GELU, approximate="tanh"))
    torch.save(state(net), tmp_path / "vit.pth")
    silent = convert_checkpoint(tmp_path / "vit.pth", tmp_path / "silent", "backbone")
    pictures, got = features(tmp_path / "silent")
    with pytest.raises(AssertionError):
        same(got, net(pictures))
    said = {"heads": "--num_heads", "eps 1e-06 assumed": "--layer_norm_eps", "GELU assumed": "--hidden_act",
            "a square": "--image_size", "mean and std": "--image_mean", "feature": "class token"}  # fmt: skip
    written = (tmp_path / "silent" / "README.md").read_text()
    report = json.loads((tmp_path / "silent" / "conversion.json").read_text())
    for what, flag in said.items():
        assert any(what in note and flag in note for note in silent.notes), what
        assert any(what in note and flag in note for note in report["notes"]), what
        assert any(what in line and flag in line for line in written.splitlines()), what
    given = {"layer_norm_eps": 1e-2, "hidden_act": "gelu_pytorch_tanh", "num_heads": 2, "image_size": (32, 32)}
    done = convert_checkpoint(
        tmp_path / "vit.pth", tmp_path / "asked", "backbone", image_mean=[0.5] * 3, image_std=[0.5] * 3, **given
    )
    pictures, got = features(tmp_path / "asked")
    same(got, net(pictures))
    config = AutoConfig.from_pretrained(tmp_path / "asked")
    assert (config.layer_norm_eps, config.hidden_act, config.qkv_bias) == (1e-2, "gelu_pytorch_tanh", True)
    assert not [note for note in done.notes if "--" in note]  # all that has a flag was given


def test_the_whole_mae_takes_the_eps_as_well(tmp_path: Path) -> None:
    case = load_file(Path(__file__).parents[1] / "golden" / "cases" / "mae" / "model_a" / "tensors.safetensors")
    weights = {name.removeprefix("weight."): t for name, t in case.items() if name.startswith("weight.")}
    torch.save({"model": weights}, tmp_path / "mae.pth")
    sizes = {"num_heads": 4, "decoder_num_heads": 2}
    convert_checkpoint(tmp_path / "mae.pth", tmp_path / "out", "mae", layer_norm_eps=3e-3, **sizes)
    model, _ = load_method(tmp_path / "out")
    assert model.backbone.config.layer_norm_eps == 3e-3 == model.decoder.norm.eps
    act = convert_checkpoint(tmp_path / "mae.pth", tmp_path / "act", "mae", hidden_act="relu", **sizes)
    assert not act.whole and any("MAE's decoder has GELU" in note for note in act.notes)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layer_norm_eps": 0.0}, "must lie between 0 and 1"),
        ({"hidden_act": "gellu"}, "has no --hidden_act gellu"),
    ],
)
def test_a_wrong_eps_or_activation_is_a_sentence(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    torch.save(state(vit()), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(tmp_path / "vit.pth", tmp_path / "out", "backbone", **given)


def test_a_resnet_has_no_layer_norm(tmp_path: Path) -> None:
    torch.save(state(resnet("BasicBlock")), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="A ResNet has no LayerNorm"):
        convert_checkpoint(tmp_path / "resnet.pth", tmp_path / "out", "backbone", layer_norm_eps=1e-5)
    done = convert_checkpoint(tmp_path / "resnet.pth", tmp_path / "out", "backbone")
    assert any("BatchNorm's eps 1e-05" in note for note in done.notes)
