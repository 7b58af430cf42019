"""What is published opens in plain transformers on a machine that has no hf_ssl, with the trained model's features."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ssl.hub import export, load_method
from hf_ssl.methods import METHODS
from tests import PATIENCE
from tests.contract.tiny import TINY, adamw, batch, build, pictures, processor, train_step
from tests.without_hf_ssl import BLOCKED

# Runs with hf_ssl out of reach: loads every export four ways and writes the features down.
_PLAIN = (
    BLOCKED
    + """
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

for folder in sorted(Path(sys.argv[1]).iterdir()):
    raw = load_file(folder / "pictures.safetensors")
    images = [Image.fromarray(image.numpy()) for image in raw["images"]]
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    head = {key for key in report["unexpected_keys"] if key.startswith("classifier.")}  # of an exported classifier
    assert set(report["unexpected_keys"]) == head, report
    assert all(key.startswith("pooler.") for key in report["missing_keys"]), report
    with torch.no_grad():
        output = model(pixels)
        pooled = output.pooler_output if model.config.model_type == "resnet" else output.last_hidden_state[:, 0]
        auto = AutoModelForImageClassification
        labels = {} if head else {"num_labels": 5}
        classifier, report = auto.from_pretrained(folder, **labels, output_loading_info=True)
        assert not head or not report["missing_keys"], report
        assert all("classifier" in key for key in report["missing_keys"]), report
        base = getattr(classifier, classifier.base_model_prefix)(pixels)
        logits = classifier(pixels).logits
    extracted = pipeline("image-feature-extraction", model=str(folder), image_processor=processor)(images[0])
    save_file({
        "pixel_values": pixels, "features": pooled.flatten(1).contiguous(), "classifier": base[0], "logits": logits,
        "plain": output[0], "pipeline": torch.tensor(extracted),
    }, folder / "plain.safetensors")
assert not any(name.split(".")[0] == "hf_ssl" for name in sys.modules)
"""
)
_IMAGES = [name for name in sorted(METHODS) if TINY[name].native is dict]  # image-text methods: see below
_FAST = {"dino": {"teacher_momentum": 0.1}}  # a teacher that has left its start after two steps
_EXPORTS = {**{name: (name, {}) for name in _IMAGES}, "simclr-resnet": ("simclr", {"model_type": "resnet"})}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method after two optimiser steps, exported, and read by a plain transformers process."""
    from tests.contract.tiny import RESNET, VIT

    root = tmp_path_factory.mktemp("exports")
    for folder, (name, backbone) in _EXPORTS.items():
        model = build(name, RESNET if backbone else VIT, **_FAST.get(name, {}))
        model.total_steps.fill_(1000)
        optimizer = adamw(model)
        for seed in range(2):
            train_step(model, optimizer, batch(name, seed=seed))
        export(model, processor(name), root / folder)
        images = torch.stack([torch.from_numpy(image) for image in pictures(3, seed=11)])
        save_file({"images": images}, root / folder / "pictures.safetensors")
        state = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(state, root / folder / "trained.safetensors")  # to compare with what the export gives back
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, str(root)], capture_output=True, text=True, timeout=PATIENCE, cwd=root
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("folder", _EXPORTS)
def test_plain_transformers_gives_the_trained_features(folder: str, exports: Path) -> None:
    plain = load_file(exports / folder / "plain.safetensors")
    trained, made = load_method(exports / folder)
    with torch.no_grad():
        features = trained.features(plain["pixel_values"])
    torch.testing.assert_close(plain["features"], features, rtol=0, atol=1e-6)
    assert features.std(0).max() > 0  # not one constant that equals any other
    torch.testing.assert_close(plain["classifier"], plain["plain"], rtol=0, atol=1e-6)
    torch.testing.assert_close(plain["pipeline"][0], plain["plain"][0], rtol=0, atol=1e-5)
    if TINY[_EXPORTS[folder][0]].classes:
        with torch.no_grad():
            torch.testing.assert_close(plain["logits"], trained(plain["pixel_values"]).logits, rtol=0, atol=1e-6)
    else:
        assert plain["logits"].shape == (3, 5)
    assert plain["pixel_values"].shape == (3, 3, 16, 16)
    again = made.eval_processor()(list(load_file(exports / folder / "pictures.safetensors")["images"].numpy()))
    assert torch.equal(torch.as_tensor(again["pixel_values"][0]), plain["pixel_values"][0])


@pytest.mark.parametrize("folder", _EXPORTS)
def test_the_method_itself_comes_back_whole(folder: str, exports: Path) -> None:
    model, made = load_method(exports / folder)
    name = _EXPORTS[folder][0]
    trained = load_file(exports / folder / "trained.safetensors")
    state = model.state_dict()
    assert set(trained) == set(state) and all(torch.equal(state[key], value) for key, value in trained.items())
    assert int(model.step) == 2 and made.to_dict() == processor(name).to_dict()
    assert TINY[name].config.items() <= model.config.to_dict().items()


def test_the_root_is_native_and_the_better_half(exports: Path) -> None:
    for folder in _EXPORTS:
        config = json.loads((exports / folder / "config.json").read_text())
        assert config["model_type"] == ("resnet" if folder.endswith("resnet") else "vit")
        assert "hf_ssl" not in json.dumps(config)
        text = (exports / folder / "preprocessor_config.json").read_text()
        assert "SSL" not in text and "DINO" not in text
    root, whole = (
        load_file(exports / "dino" / "model.safetensors"),
        load_file(exports / "dino" / "trained.safetensors"),
    )
    key = "embeddings.cls_token"
    assert torch.equal(root[key], whole[f"teacher_backbone.{key}"])
    assert not torch.equal(root[key], whole[f"backbone.{key}"])
    root, whole = (load_file(exports / "msn" / f"{name}.safetensors") for name in ("model", "trained"))
    assert torch.equal(root[key], whole[f"backbone.{key}"])  # of its teacher 99 % is still the random start
    assert not torch.equal(root[key], whole[f"teacher_backbone.{key}"])


# --- image and text -----------------------------------------------------------------------------------------------

_PLAIN_PAIRS = (
    BLOCKED
    + "from pathlib import Path\n"
    + """
import json
from PIL import Image
from safetensors.torch import load_file
from transformers import (AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor, AutoTokenizer,
                          CLIPProcessor, pipeline)

for folder in sorted(Path(sys.argv[1]).iterdir()):
    asked = json.loads((folder / "asked.json").read_text())
    images = [Image.fromarray(image.numpy()) for image in load_file(folder / "pictures.safetensors")["images"]]
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"], report
    zero_shot = pipeline("zero-shot-image-classification", model=str(folder))
    words = {"candidate_labels": asked["labels"], "hypothesis_template": asked["template"]}
    answers = [{one["label"]: one["score"] for one in zero_shot(image, **words)} for image in images]
    texts = [asked["template"].format(label) for label in asked["labels"]]
    inputs = AutoProcessor.from_pretrained(folder)(text=texts, images=images, padding=True, return_tensors="pt")
    logits = model(**inputs).logits_per_image.tolist()
    kinds = {auto.__name__: type(auto.from_pretrained(folder)).__name__
             for auto in (AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, CLIPProcessor)}
    if model.config.model_type == "clip":
        tower = AutoModelForImageClassification.from_pretrained(folder, num_labels=5)
        assert tower(inputs["pixel_values"]).logits.shape == (len(images), 5)
    (folder / "answers.json").write_text(json.dumps({"scores": answers, "logits": logits, "kinds": kinds}))
assert not any(name.split(".")[0] == "hf_ssl" for name in sys.modules)
"""
)
_LABELS = ["red waves", "blue checks", "big grey stripes"]  # the pipeline cuts no prompt: 16 tokens at most


def test_plain_transformers_gives_the_zero_shot_scores(tmp_path: Path) -> None:
    """CLIPModel and the dual encoder: pipeline, AutoProcessor and AutoModel agree with the trained method."""
    from tests.contract.tiny import VIT

    towers = {"clip": VIT, "dual": {**VIT, "image_size": [16, 16]}}
    for folder, vision in towers.items():
        model = build("clip", vision)
        optimizer = adamw(model)
        for seed in range(2):
            train_step(model, optimizer, batch("clip", seed=seed))
        export(model, processor("clip"), tmp_path / folder)
        images = torch.stack([torch.from_numpy(image) for image in pictures(3, seed=11)])
        save_file({"images": images}, tmp_path / folder / "pictures.safetensors")
        asked = {"labels": _LABELS, "template": "a drawing of {}"}
        (tmp_path / folder / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN_PAIRS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, kind in (("clip", "CLIPModel"), ("dual", "VisionTextDualEncoderModel")):
        answers = json.loads((tmp_path / folder / "answers.json").read_text())
        assert answers["kinds"] == {
            "AutoImageProcessor": "CLIPImageProcessor", "AutoModel": kind, "AutoProcessor": "CLIPProcessor",
            "AutoTokenizer": "CLIPTokenizer", "CLIPProcessor": "CLIPProcessor",
        }  # fmt: skip
        model, made = load_method(tmp_path / folder)
        assert int(model.step) == 2 and made.to_dict() == processor("clip").to_dict()
        pixels = made.eval_processor()(pictures(3, seed=11), return_tensors="pt")["pixel_values"]
        texts = made.encode_text([f"a drawing of {label}" for label in _LABELS])
        with torch.no_grad():
            sides = model.eval().features(pixels), model.text_features(**texts)
        images, words = (side / side.norm(dim=-1, keepdim=True) for side in sides)
        logits = (model.backbone.logit_scale.exp() * images @ words.T).detach()
        torch.testing.assert_close(torch.tensor(answers["logits"]), logits, rtol=0, atol=1e-4)
        scores = torch.tensor([[row[label] for label in _LABELS] for row in answers["scores"]])
        torch.testing.assert_close(scores, logits.softmax(-1), rtol=0, atol=1e-5)
        assert logits.std(1).min() > 1e-3  # the labels differ
