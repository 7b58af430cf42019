"""Which number format a run trains in: measured without a trace, printed, saved, restored."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_ssl import SSLTrainer, SSLTrainingArguments
from hf_ssl.training import precision
from hf_ssl.training.precision import Choice
from tests.contract.tiny import RESNET, VIT, batch, build, processor

FP32, BF16, EAGER = Choice("fp32"), Choice("bf16"), Choice("bf16", "eager")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """What is decided here is remembered nowhere else; every processor has bf16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "native_bf16", lambda: True)


def clock(monkeypatch, fp32: float, bf16: float, eager: float = 0.0) -> None:
    """The measurement finds these seconds: a timing is no unit test, what follows from it is."""
    table = {FP32: fp32, BF16: bf16, EAGER: eager or bf16}
    monkeypatch.setattr(precision, "_measure", lambda model, views, offered, seconds: {c: table[c] for c in offered})


@pytest.mark.parametrize("name", ["simclr", "dino", "fixmatch", "mae", "clip"])
def test_measuring_leaves_no_trace(name: str) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random, attention = torch.get_rng_state(), model.backbone.config._attn_implementation
    choice = precision.choose(model, batch(name, 8), seconds=0.5)
    assert choice.precision in ("fp32", "bf16") and "times as fast" in choice.said
    assert precision.choose(model, batch(name, 8), seconds=0.5) == choice  # remembered
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in model.parameters())
    assert model.backbone.config._attn_implementation == attention and not model.attention_given


def test_the_measurement_times_every_candidate_and_stops_in_time() -> None:
    model = build("mae")
    times = precision._measure(model, batch("mae", 4), [FP32, BF16, EAGER], seconds=0.0)
    assert set(times) == {FP32, BF16, EAGER} and all(seconds > 0 for seconds in times.values())


def test_a_format_with_another_gradient_is_never_the_fastest() -> None:
    model = build("simclr")

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.factor = 100.0 if torch.is_autocast_enabled("cpu") else 1.0
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor

    model.projector.register_forward_hook(lambda module, args, output: Wrong.apply(output))
    times = precision._measure(model, batch("simclr", 4), [FP32, BF16], seconds=0.0)
    assert times[FP32] < times[BF16] == float("inf")


MEASURED = """
import torch
from pathlib import Path
from transformers import ResNetConfig
from hf_ssl.methods import load
from hf_ssl.training import precision

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

torch.set_num_threads(1)
simclr = load("simclr")
config = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
model = simclr(simclr.config_class(backbone_config=config))
views = {"pixel_values": torch.randn(16, 2, 3, 96, 96)}
before = resident("VmRSS")
precision.choose(model, views, seconds=1.0)
print((resident("VmRSS") - before) / (resident("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count of memory")
def test_what_measuring_took_is_given_back() -> None:
    """Without that three quarters stayed, and a step's peak was 4 % higher (ResNet-50 at 224)."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


def test_a_batch_without_a_gradient_is_measured_too() -> None:
    """A memory that is still empty, weights that start at 0: nothing to compare, and no reason to stop."""
    model = build("simclr", RESNET)
    model.projector.register_forward_hook(lambda module, args, output: output * 0)
    times = precision._measure(model, batch("simclr", 4), [FP32, BF16], seconds=0.0)
    assert all(0 < seconds < float("inf") for seconds in times.values())


def test_what_is_offered() -> None:
    vit, resnet = build("simclr"), build("simclr", RESNET)
    small, large = batch("simclr"), {"pixel_values": torch.zeros(1, 2, 3, 128, 128)}
    for model in (vit, resnet):
        assert precision.candidates(model, "fp32") == [FP32] and precision.candidates(model, "fp16") == [
            Choice("fp16")
        ]
    assert precision.candidates(vit, "bf16") == [EAGER]  # stated: no clock has a say in the attention either
    assert precision.candidates(vit, "auto", small) == [EAGER, FP32]  # the processor's rule comes first
    assert precision.candidates(resnet, "auto", small)[0] == FP32
    assert precision.candidates(resnet, "auto", large)[0].precision == "bf16"
    assert precision.candidates(vit.to("meta")) == [FP32]  # stands for any device that is no CPU
    for given in ("sdpa", "eager"):
        model = build("simclr")
        model.set_attn_implementation(given)
        assert precision.candidates(model, "bf16") == [BF16]


def test_a_processor_without_bf16_of_its_own_trains_in_fp32(monkeypatch) -> None:
    monkeypatch.setattr(precision, "native_bf16", lambda: False)
    assert precision.candidates(build("simclr")) == [FP32]


def test_a_clear_margin_alone_overrules_the_processors_rule() -> None:
    """Ratios of a busy machine vary by a tenth: two equal commands must not land on two sides of a threshold."""
    for fp32 in (0.8, 1.0, 1.25, 3.0):  # bf16 takes 1
        assert precision.decide([EAGER, FP32], {FP32: fp32, EAGER: 1.0}) == EAGER
    assert precision.decide([EAGER, FP32], {FP32: 0.7, EAGER: 1.0}) == FP32
    assert precision.decide([FP32, BF16], {FP32: 1.25, BF16: 1.0}) == FP32
    assert precision.decide([FP32, BF16], {FP32: 1.9, BF16: 1.0}) == BF16
    wrong = float("inf")  # a gradient that is not fp32's
    assert precision.decide([EAGER, FP32], {FP32: 9.0, EAGER: wrong}) == FP32
    assert precision.decide([FP32, BF16], {FP32: 9.0, BF16: wrong}) == FP32
    said = precision.decide([FP32, BF16], {FP32: 1.9, BF16: 1.0}).said
    assert said == "bf16: 1.90 times as fast as fp32 here; --precision fp32 overrides"
    said = precision.decide([FP32, BF16], {FP32: 1.1, BF16: 1.0}).said
    assert said == "fp32, as a rule on this processor: bf16 is 1.10 times as fast here"


def test_a_decision_is_remembered_for_the_machine_and_the_shape(monkeypatch, tmp_path) -> None:
    model, views = build("simclr"), batch("simclr")
    clock(monkeypatch, 3.0, 1.0)
    assert precision.choose(model, views) == EAGER
    clock(monkeypatch, 1.0, 3.0)  # the machine is busy
    assert precision.choose(model, views) == EAGER
    assert precision.choose(model, batch("simclr", 8)) == FP32  # another batch is another question
    monkeypatch.setattr(precision, "_processor", lambda: ("another", ()))
    assert precision.choose(model, views) == FP32
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = list((tmp_path / "cache" / "hf_ssl" / "precision").iterdir())
    assert len(files) == 3 and all(file.suffix == ".json" for file in files)


def test_a_damaged_or_forbidden_memory_is_no_error(monkeypatch, tmp_path) -> None:
    model, views = build("simclr"), batch("simclr")
    clock(monkeypatch, 1.0, 3.0)
    file = precision._memory(model, views, [EAGER, FP32])
    for damage in ("{", "[]", '{"precision": "fp64", "attention": null, "said": ""}'):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(damage)
        assert precision.choose(model, views) == FP32
        assert json.loads(file.read_text())["precision"] == "fp32"  # made good
        file.unlink()
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert precision.choose(model, views) == FP32


def test_of_two_that_decide_at_once_the_first_counts_for_both(tmp_path) -> None:
    file = tmp_path / "cache" / "one.json"
    assert precision._remember(file, EAGER, [EAGER, FP32]) == EAGER
    assert precision._remember(file, FP32, [EAGER, FP32]) == EAGER
    assert [path.name for path in file.parent.iterdir()] == ["one.json"]


def test_the_decoder_follows_the_attention() -> None:
    model = build("mae")
    assert model.decoder.config._attn_implementation == "sdpa"
    before = model(**batch("mae")).loss
    precision.apply(model, EAGER)
    kinds = {model.config._attn_implementation, model.backbone.config._attn_implementation}
    assert kinds | {layer.attention.config._attn_implementation for layer in model.decoder.layers} == {"eager"}
    torch.testing.assert_close(model(**batch("mae")).loss, before)


def make_trainer(pictures, folder, **arguments) -> SSLTrainer:
    defaults = {
        "per_device_train_batch_size": 16, "learning_rate": 0.05, "save_steps": 2, "report_to": [],
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return SSLTrainer(
        build("simclr"), SSLTrainingArguments(str(folder), **{**defaults, **arguments}), pictures, processor("simclr")
    )


def bf16_products(trainer) -> list[torch.dtype]:
    """The dtype of what the projector multiplies at each step from now on."""
    seen: list[torch.dtype] = []
    trainer.model.projector[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    return seen


def test_a_measured_choice_is_kept_and_resumed_without_measuring(tmp_path, pictures, monkeypatch, capsys) -> None:
    monkeypatch.setattr(precision, "WORTH_STEPS", 4)
    offered = {"auto": [FP32, BF16], "fp32": [FP32]}
    monkeypatch.setattr(precision, "candidates", lambda model, stated="auto", batch=None: offered[stated])
    clock(monkeypatch, 2.0, 1.0)
    whole = make_trainer(pictures, tmp_path / "whole", max_steps=6)
    seen = bf16_products(whole)
    whole.train()
    assert capsys.readouterr().out.count("bf16: 2.00 times as fast as fp32 here; --precision fp32 overrides") == 1
    assert set(seen) == {torch.bfloat16} and whole.args.precision == "auto"
    said = json.loads((tmp_path / "whole" / "checkpoint-4" / "training_args.json").read_text())
    assert said["precision"] == "bf16"
    record = whole.run_record()
    assert record["precision"] == "bf16" and "2.00 times as fast" in record["precision_reason"]

    clock(monkeypatch, 1.0, 2.0)  # the machine has changed its mind
    resumed = make_trainer(pictures, tmp_path / "resumed", max_steps=6)
    seen = bf16_products(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert set(seen) == {torch.bfloat16} and "fast" not in capsys.readouterr().out
    for name, value in whole.method.state_dict().items():
        assert torch.equal(value, resumed.method.state_dict()[name]), name

    stated = make_trainer(pictures, tmp_path / "stated", max_steps=6, precision="fp32", allow_changed="precision")
    seen = bf16_products(stated)
    stated.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert set(seen) == {torch.float32}


def test_measuring_changes_no_number_of_a_run(tmp_path, pictures, monkeypatch) -> None:
    runs = []
    for worth in (99, 1):  # the second run measures, truly, and is told that fp32 won
        monkeypatch.setattr(precision, "WORTH_STEPS", worth)
        monkeypatch.setattr(precision, "CLEAR", 1e9)
        monkeypatch.setattr(precision, "_attends", lambda model: False)  # the rule is fp32 then
        trainer = make_trainer(pictures, tmp_path / str(worth), max_steps=3)
        trainer.train()
        runs.append({name: value.clone() for name, value in trainer.method.state_dict().items()})
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_short_runs_and_stated_ones_measure_nothing(tmp_path, pictures, monkeypatch) -> None:
    clock(monkeypatch, 2.0, 1.0)
    short = make_trainer(pictures, tmp_path / "short", max_steps=1)
    short.train()
    assert short.precision == FP32
    monkeypatch.setattr(precision, "WORTH_STEPS", 1)
    stated = make_trainer(pictures, tmp_path / "stated", max_steps=1, precision="fp32")
    stated.train()
    assert stated.precision == FP32


@pytest.mark.parametrize("won", ["bf16", "fp32"])
def test_what_auto_chose_repeats_the_run_where_it_is_stated(tmp_path, pictures, monkeypatch, won) -> None:
    monkeypatch.setattr(precision, "WORTH_STEPS", 1)
    clock(monkeypatch, *((3.0, 1.0) if won == "bf16" else (1.0, 3.0)))
    auto = make_trainer(pictures, tmp_path / "auto", max_steps=2, save_strategy="no")
    auto.train()
    told = auto.run_record()
    assert told["precision"] == won and told["attn_implementation"] == ("eager" if won == "bf16" else "sdpa")
    stated = make_trainer(pictures, tmp_path / "stated", max_steps=2, save_strategy="no", precision=told["precision"])
    stated.train()
    assert stated.run_record()["attn_implementation"] == told["attn_implementation"]
    for name, value in auto.method.state_dict().items():
        assert torch.equal(value, stated.method.state_dict()[name]), name


def test_restored_attention_yields_to_a_given_one(tmp_path) -> None:
    (tmp_path / "training_args.json").write_text(json.dumps({"precision": "bf16", "attn_implementation": "eager"}))
    model = build("dino", VIT)
    assert precision.restore(tmp_path, model, "auto") == EAGER == precision.restore(tmp_path, model, "bf16")
    assert precision.restore(tmp_path, model, "fp32") is None
    model.set_attn_implementation("sdpa")
    assert precision.restore(tmp_path, model, "auto") == BF16
    assert precision.restore(tmp_path / "nowhere", model, "auto") is None
