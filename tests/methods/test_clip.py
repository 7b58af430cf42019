import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, CLIPModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel, ViTConfig

from hf_ssl import backbones, distributed
from hf_ssl.backbones import two_towers
from hf_ssl.data.emoji import centre, load_emoji
from hf_ssl.methods.image_text import clip
from hf_ssl.methods.image_text.clip import (
    MAX_LOGIT_SCALE,
    SSLCLIPConfig,
    SSLCLIPForPreTraining,
    SSLCLIPImageProcessor,
    clip_logits,
    clip_loss,
)
from hf_ssl.processing import tokenizers
from hf_ssl.training.optim import decay_names
from tests import PATIENCE
from tests.contract.tiny import TOKENIZER, VIT, batch, build, train_step
from tests.invariants.ranks import run_on_ranks

CONVNEXT = {"model_type": "convnextv2", "hidden_sizes": [8, 8, 8, 12], "depths": [1, 1, 1, 1], "image_size": 32}
MOBILENET = {"model_type": "mobilenet_v2", "depth_multiplier": 0.1, "image_size": 32}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def gradients(model: nn.Module, views: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and every parameter's gradient."""
    model.zero_grad()
    loss = model(**views).loss
    loss.backward()
    return {"loss": loss.detach()} | {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


# --- loss ---------------------------------------------------------------------------------------------------------


def test_loss_by_hand() -> None:
    images, texts, scale = unit(3, 4), unit(3, 4), 5.0
    wanted = 0.0
    for i in range(3):
        for one, others in ((images[i], texts), (texts[i], images)):
            scores = [scale * float(one @ other) for other in others]
            wanted += (math.log(sum(map(math.exp, scores))) - scores[i]) / 6  # three rows, two directions
    loss, _ = clip_loss(*clip_logits(images, texts, images, texts, torch.tensor(scale)))
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_each_direction_has_its_own_accuracy_and_offset() -> None:
    to_texts = torch.tensor([[0.0, 0, 3, 0], [0.0, 5, 0, 1]])  # partners: columns 2 and 3
    to_images = torch.tensor([[0.0, 0, 3, 0], [0.0, 0, 0, 9]])
    loss, metrics = clip_loss(to_texts, to_images, offset=2)
    assert {k: float(v) for k, v in metrics.items()} == {"image_to_text_accuracy": 0.5, "text_to_image_accuracy": 1.0}
    partners = torch.tensor([2, 3])
    assert loss == (F.cross_entropy(to_texts, partners) + F.cross_entropy(to_images, partners)) / 2
    assert clip_loss(to_texts, to_images)[0] > loss + 1


def test_one_process_has_the_native_loss_and_gradient() -> None:
    for vision in (VIT, CONVNEXT):
        model, views = build("clip", vision).eval(), batch("clip", size=vision["image_size"])
        pairs = {**views, "pixel_values": views["pixel_values"][:, 0]}
        wanted = gradients(model.backbone, {**pairs, "return_loss": True})
        got = {key.removeprefix("backbone."): value for key, value in gradients(model, views).items()}
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        assert torch.equal(model(**pairs).loss, model(**views).loss)  # the view axis may be left out


def test_autocast_does_not_touch_the_logits() -> None:
    """At a scale of 100 a bfloat16 product is off by half a logit."""
    images, texts, scale = unit(8, 16), unit(8, 16), torch.tensor(100.0)
    exact = clip_logits(images, texts, images, texts, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = clip_logits(images, texts, images, texts, scale)
    assert all(torch.equal(a, b) for a, b in zip(exact, rough, strict=True))


def test_training_reports_scale_and_detached_image_embeddings() -> None:
    model, views = build("clip"), batch("clip")
    output = model(**views)
    assert not output.embeddings.requires_grad
    assert torch.equal(output.embeddings, model.features(views["pixel_values"][:, 0]))
    assert float(output.metrics["logit_scale"]) == pytest.approx(1 / 0.07, rel=1e-4)
    assert set(output.metrics) == {"logit_scale", "image_to_text_accuracy", "text_to_image_accuracy"}


# --- ranks --------------------------------------------------------------------------------------------------------


def pairs_on_a_rank(name: str) -> dict[str, Tensor]:
    """One optimiser step's loss and gradients on this rank's share of 8 pairs, and the shape of what it compared."""
    world, rank = distributed.world_size(), distributed.rank()
    model = build("clip", seed=1, micro_batch_size=3 if name == "chunks" else None)
    with torch.no_grad():  # embeddings that differ: at the start of training all gradients are next to nothing
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    wrapped: nn.Module = DistributedDataParallel(model) if world > 1 else model
    shapes: list[tuple[int, ...]] = []
    compare = clip.clip_logits

    def remember(*args: Any) -> Any:
        logits = compare(*args)
        shapes.extend(tuple(side.shape) for side in logits)
        return logits

    clip.clip_logits = remember
    try:
        got = gradients(wrapped, {key: value.chunk(world)[rank] for key, value in batch("clip", 8).items()})
    finally:
        clip.clip_logits = compare
    got = {key.removeprefix("module."): value for key, value in got.items()}
    return {**got, "loss": distributed.all_mean(got["loss"]), "shapes": torch.tensor(shapes)}


def test_two_ranks_compare_with_the_global_batch(tmp_path: Path) -> None:
    """transformers' own CLIP compares 4 with 4; the logit scale's gradient is off where a gather lacks gradient."""
    wanted = pairs_on_a_rank("whole")
    assert "backbone.logit_scale" in wanted and wanted["shapes"].tolist() == [[8, 8], [8, 8]]
    for results in run_on_ranks(pairs_on_a_rank, ["whole", "chunks"], tmp_path).values():
        for got in results:
            assert not isinstance(got, str), got
            assert got.pop("shapes").tolist() == [[4, 8], [4, 8]]
            assert set(got) == set(wanted) - {"shapes"}
            for key, value in got.items():
                torch.testing.assert_close(
                    value, wanted[key], rtol=1e-5, atol=1e-5, msg=lambda t, key=key: f"{key}: {t}"
                )


# --- the scale ----------------------------------------------------------------------------------------------------


def test_the_scale_stops_at_a_hundred_and_is_never_decayed() -> None:
    model = build("clip")
    assert not any("logit_scale" in name for name in decay_names(model))
    optimizer = torch.optim.SGD([model.backbone.logit_scale], lr=1e-3)
    model.backbone.logit_scale.data.fill_(MAX_LOGIT_SCALE + 3)
    train_step(model, optimizer, batch("clip"))
    assert float(model.backbone.logit_scale) == pytest.approx(math.log(100))
    model.backbone.logit_scale.data.fill_(-1.0)
    model.after_optimizer_step()
    assert float(model.backbone.logit_scale) == -1.0  # no lower bound


def test_a_scale_that_no_checkpoint_has_starts_at_its_initial_value(tmp_path: Path) -> None:
    model = build("clip")
    model.backbone.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["logit_scale"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = SSLCLIPForPreTraining.from_pretrained(tmp_path, config=model.config)
    assert float(again.backbone.logit_scale) == pytest.approx(math.log(1 / 0.07), abs=1e-4)
    model.backbone.logit_scale.data.fill_(3.0)
    model.save_pretrained(tmp_path)
    assert float(SSLCLIPForPreTraining.from_pretrained(tmp_path).backbone.logit_scale) == 3.0


# --- chunks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "dual encoder", "checkpointed layers", "bf16"])
def test_chunks_change_neither_loss_nor_gradient(kind: str) -> None:
    vision = CONVNEXT if kind == "dual encoder" else VIT
    views, got = batch("clip", 8, size=vision["image_size"]), []
    for size in (None, 3):
        model = build("clip", vision, micro_batch_size=size)
        if kind == "checkpointed layers":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            got.append(gradients(model, views))
    assert set(got[0]) == set(got[1])
    for key, wanted in got[0].items():  # bfloat16 gradients of three chunks add up in another order
        margin = 2e-2 * float(wanted.abs().max()) + 1e-4 if kind == "bf16" else 1e-5
        torch.testing.assert_close(got[1][key], wanted, rtol=0, atol=margin, msg=lambda t, key=key: f"{key}: {t}")


def test_a_tower_sees_a_chunk_at_a_time_and_twice() -> None:
    model, seen = build("clip", micro_batch_size=3), []
    model.backbone.vision_model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    loss = model(**batch("clip", 8)).loss
    assert seen == [3, 3, 2]
    loss.backward()
    assert sorted(seen) == [2, 2, 3, 3, 3, 3]
    with torch.no_grad():
        model(**batch("clip", 8))
    assert seen[6:] == [8]  # nothing is kept without a gradient


def test_chunks_are_rerun_with_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    words = BertConfig(
        vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.4,
    )  # fmt: skip
    config = two_towers.image_text_config(ViTConfig(**{**VIT, "hidden_dropout_prob": 0.4}), words, TOKENIZER, 16)
    torch.manual_seed(0)
    model = SSLCLIPForPreTraining(SSLCLIPConfig(backbone_config=config, micro_batch_size=3)).train()
    views = batch("clip", 8)
    torch.manual_seed(5)
    got = gradients(model, views)
    monkeypatch.setattr(clip, "_checkpointed", lambda tower, *tensors: tower(*tensors))
    torch.manual_seed(5)
    for key, wanted in gradients(model, views).items():
        torch.testing.assert_close(got[key], wanted, rtol=1e-5, atol=1e-6)


def test_batchnorm_towers_refuse_chunks_in_training() -> None:
    model, views = build("clip", MOBILENET, micro_batch_size=2), batch("clip", size=32)
    with pytest.raises(ValueError, match="micro_batch_size with a BatchNorm tower"):
        model(**views)
    assert model.eval()(**views).loss.isfinite()  # fixed statistics: chunks change nothing
    assert build("clip", MOBILENET)(**views).loss.isfinite()


_STEPS = """
import re
import torch
from hf_ssl.backbones import two_towers
from hf_ssl.processing import tokenizers
from hf_ssl.methods.image_text.clip import SSLCLIPConfig, SSLCLIPForPreTraining
from tests.contract.tiny import TOKENIZER

torch.set_num_threads(1)
vision = dict(model_type="vit", image_size=32, patch_size=4, hidden_size=64, num_hidden_layers=4,
              num_attention_heads=2, intermediate_size=256)
towers = two_towers.image_text_config(vision, "text-pico", TOKENIZER, 64)
model = SSLCLIPForPreTraining(SSLCLIPConfig(backbone_config=towers)).train()

def memory(kind):
    return int(re.search(rf"{kind}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def peak_growth(count, micro_batch_size):
    model.config.micro_batch_size = micro_batch_size
    ids = torch.full((count, 16), 300)
    ids[:, 0], ids[:, -1] = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    pixels = torch.zeros(count, 3, 32, 32).normal_()
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here on
    before = memory("VmRSS")
    model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids)).loss.backward()
    return memory("VmHWM") - before  # not ru_maxrss, which starts at the size of the process that started this one

peak_growth(4, 2), peak_growth(4, None)  # libraries, kernels and gradients are in memory from here on
print(peak_growth(128, 16), peak_growth(128, None))
"""


def test_eight_chunks_need_less_than_half_of_the_memory() -> None:
    """How far the process's peak memory rises above its level before one forward and backward pass."""
    freed_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _STEPS], capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, **freed_at_once}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    chunks, whole = map(float, done.stdout.split())
    assert whole > 100e6  # activations, well above the allocator's noise
    assert chunks < 0.45 * whole, f"{chunks / 1e6:.0f} of {whole / 1e6:.0f} MB"  # seen: 0.13 to 0.15


# --- what it is made of -------------------------------------------------------------------------------------------


def test_the_native_model_follows_from_the_towers() -> None:
    assert type(build("clip").backbone) is CLIPModel
    model = build("clip", CONVNEXT)
    assert type(model.backbone) is VisionTextDualEncoderModel
    views = batch("clip", size=32)
    wanted = model.backbone.get_image_features(views["pixel_values"][:, 0]).pooler_output
    assert torch.equal(model(**views).embeddings, wanted)
    assert model.text_features(views["input_ids"], views["attention_mask"]).shape == (4, 16)


@pytest.mark.parametrize("image_size", [16, [16, 16]])  # CLIPModel, dual encoder with a ViT
def test_evaluation_reads_the_joint_space_and_the_image_tower(image_size: Any) -> None:
    native = build("clip", {**VIT, "image_size": image_size, "hidden_size": 24}).eval().backbone
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(backbones.features(native, images), native.get_image_features(images).pooler_output)
        assert backbones.feature_dim(native) == 16 and backbones.patch_tokens(native, images).shape == (2, 16, 24)
        attention = backbones.last_attention(native, images)
        assert attention.shape == (2, 2, 16) and attention.min() > 0 and attention.sum(-1).max() < 1
        larger = torch.randn(2, 3, 24, 24)
        assert backbones.features(native, larger).shape == (2, 16)
        assert backbones.patch_tokens(native, larger).shape == (2, 36, 24)


@pytest.mark.parametrize(("change", "words"), [
    ({"pixel_values": torch.zeros(4, 2, 3, 16, 16)}, "1 view per image, got 2"),
    ({"input_ids": None}, "CLIP trains on pairs: give input_ids"),
    ({"pixel_values": torch.zeros(3, 1, 3, 16, 16)}, "one text per image, got 3 images and 4 texts"),
])  # fmt: skip
def test_what_is_no_batch_of_pairs_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build("clip")(**{**batch("clip"), **change})


def test_configs_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(ValueError, match="an image and a text tower, not ViTConfig"):
        SSLCLIPForPreTraining(SSLCLIPConfig(backbone_config=dict(VIT)))
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1, or None"):
        SSLCLIPConfig(micro_batch_size=0)
    untold = VisionTextDualEncoderConfig(
        vision_config=dict(CONVNEXT), text_config=build("clip").config.backbone_config.text_config
    )
    with pytest.raises(ValueError, match=r"vision_config \(convnextv2\) needs hidden_size=12"):
        SSLCLIPForPreTraining(SSLCLIPConfig(backbone_config=untold))


# --- learning -----------------------------------------------------------------------------------------------------


def test_sixty_emoji_find_their_names() -> None:
    rows = [row for row in load_emoji("train") if row["style"] == "google"][::24][:60]
    names = [row["name"] for row in rows]
    assert len(set(names)) == 60
    tokenizer = tokenizers.train_tokenizer(names, 800, 16)
    processor = SSLCLIPImageProcessor(size=32, tokenizer=tokenizer, eval_crop_pct=1.0)
    pictures = [centre(decode_rgba(row["image"])) for row in rows]
    vision = {**VIT, "image_size": 32, "patch_size": 8, "hidden_size": 64, "intermediate_size": 128}
    config = two_towers.image_text_config(vision, "text-pico", tokenizer, 32)
    model = SSLCLIPForPreTraining(SSLCLIPConfig(backbone_config=config)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    words = processor.encode_text(names)

    def recall() -> float:
        pixels = processor.eval_processor()(pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            images, texts = model.eval().features(pixels), model.text_features(**words)
        scores = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        return float((scores.argmax(1) == torch.arange(60)).float().mean())

    assert recall() < 0.1  # chance: 1/60
    model.train()
    for step in range(65):
        train_step(model, optimizer, {**processor(pictures, seed=step), **words})
    assert recall() > 0.5


def decode_rgba(image: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGBA"))
