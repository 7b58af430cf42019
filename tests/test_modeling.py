import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, ViTConfig

from hf_ssl.methods import METHODS, load, name_of
from hf_ssl.modeling import SSLConfig, SSLModel, SSLOutput
from tests.contract import tiny
from tests.contract.tiny import VIT, build, make_config


def test_a_config_takes_an_instance_a_dict_or_nothing() -> None:
    fields = {key: value for key, value in VIT.items() if key != "model_type"}
    for given in (ViTConfig(**fields), dict(VIT)):
        assert SSLConfig(backbone_config=given).backbone_config.to_dict() == ViTConfig(**fields).to_dict()
    assert SSLConfig().backbone_config.hidden_size == 768


@pytest.mark.parametrize("name", METHODS)
def test_a_config_refuses_unknown_fields_and_reads_those_of_other_versions(name: str, tmp_path: Path, caplog) -> None:
    config = make_config(name)
    kind, state = type(config), config.to_dict()
    own = next(field for field in state if field.endswith(("temperature", "weight", "momentum", "dim", "config")))
    with pytest.raises(ValueError, match=f"{kind.__name__} has no field '{own}x'; the nearest is {own}"):
        kind(**state, **{f"{own}x": 1})
    with pytest.raises(ValueError, match="has no field 'top_k'"):  # transformers would drop it: texts' generation
        AutoConfig.for_model(kind.model_type, top_k=1)
    assert kind(**state).to_dict() == state
    general = kind(id2label={0: "a"}, dtype="bfloat16", attn_implementation="eager", output_attentions=True)
    assert (general.num_labels, general.dtype, general._attn_implementation) == (1, torch.bfloat16, "eager")
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": None, "of_the_future": 3}))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is kind and loaded.of_the_future == 3
    assert {**loaded.to_dict(), "of_the_future": 0, "_name_or_path": ""} == {
        **state, "of_the_future": 0, "_name_or_path": "",
    }  # fmt: skip
    assert f"{kind.__name__} has no field of_the_future" in caplog.text


def test_a_field_that_trainer_writes_is_no_field_of_another_version(tmp_path: Path, caplog) -> None:
    config = make_config("simclr")
    config.use_cache = False
    config.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(tmp_path)
    assert "has no field" not in caplog.text


def test_a_misspelt_field_in_from_pretrained_is_no_field_of_another_version(tmp_path: Path) -> None:
    model = build("simclr")
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path, temperature=0.25).config.temperature == 0.25
    with pytest.raises(TypeError, match=r"SimCLRConfig has no field .temprature.; the nearest is temperature"):
        type(model).from_pretrained(tmp_path, temprature=0.25)
    for config in (type(model.config), AutoConfig):
        with pytest.raises(ValueError, match=r"SimCLRConfig has no field .temprature.; the nearest is temperature"):
            config.from_pretrained(tmp_path, temprature=0.25)
        assert config.from_pretrained(tmp_path, temperature=0.25, local_files_only=True).temperature == 0.25
        loaded, unused = config.from_pretrained(tmp_path, temprature=0.25, return_unused_kwargs=True)
        assert loaded.temperature == model.config.temperature and unused["temprature"] == 0.25


def test_outputs_leave_out_what_is_none() -> None:
    assert list(SSLOutput(embeddings=torch.zeros(1, 2))) == ["embeddings"]


def test_progress_counts_optimiser_steps_and_stops_at_one() -> None:
    model = build("dino")
    model.total_steps.fill_(4)
    seen = []
    for _ in range(6):
        seen.append(float(model.progress))
        model.after_optimizer_step()
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1]


def test_momentum_of_the_step_is_the_one_asked_for() -> None:
    """The schedule runs over the whole run's optimiser steps; the trainer passes where the step began."""
    model = build("dino", teacher_momentum=0.5)
    model.total_steps.fill_(2)
    with torch.no_grad():
        model.head.mlp[0].bias.fill_(1.0)
    model.after_optimizer_step(0.0)
    assert torch.allclose(model.teacher_head.mlp[0].bias, torch.tensor(0.5))
    model.after_optimizer_step()  # at progress ½: momentum 0.75
    assert torch.allclose(model.teacher_head.mlp[0].bias, torch.tensor(0.625))


def test_teachers_without_a_momentum_are_an_error() -> None:
    class Forgetful(SSLModel):
        def teachers(self):
            yield nn.Linear(1, 1), nn.Linear(1, 1)

    model = Forgetful(SSLConfig(backbone_config=dict(VIT)))
    with pytest.raises(ValueError, match="Forgetful names teachers but no teacher_momentum"):
        model.after_optimizer_step()


def test_methods_by_name() -> None:
    for name in METHODS:
        assert name_of(load(name).config_class.model_type) == name
    with pytest.raises(ValueError, match="no method 'simclear'; there are: "):
        load("simclear")


def test_the_mode_reaches_the_teacher() -> None:
    model = build("dino", use_bn_in_head=True)
    norms = [m for m in model.teacher_head.modules() if isinstance(m, nn.BatchNorm1d)]
    assert norms and all(norm.training for norm in norms) and not model.teacher_backbone.training
    model.eval()
    assert not any(norm.training for norm in norms)


def test_a_saved_config_names_hub_ids_and_no_folders(tmp_path: Path) -> None:
    for origin, written in (("owner/model", "owner/model"), (str(tmp_path / "mine"), "mine"), ("/home/gone", "gone")):
        config = load("simclr").config_class()
        config.backbone_config.name_or_path = origin
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())["backbone_config"]
        assert saved["_name_or_path"] == written and config.backbone_config.name_or_path == origin


def test_an_average_that_is_still_the_random_start_is_not_published() -> None:
    """.999 ** 100 = .90 of the start; .999 ** 3000 = .0497. DINO's teacher leads early: exp(−53 · .004 / 2) ≈ .9."""
    for name in ("fixmatch", "dino", "msn", "dinov2"):
        model = tiny.build(name)
        assert model.export_backbone is model.average  # nothing was trained: they are one
        model.step.fill_(100), model.total_steps.fill_(100)
        for attribute in ("ema_momentum", "teacher_momentum", "teacher_momentum_end"):
            if hasattr(model.config, attribute):
                setattr(model.config, attribute, 0.999)
        assert model.chosen_weights()[0] == "last" and model.export_backbone is model.backbone
        assert "of the average is still the random start" in model.chosen_weights()[1]
        model.step.fill_(100_000), model.total_steps.fill_(100_000)
        assert model.export_backbone is model.average
    model = tiny.build("fixmatch", ema_momentum=0.999)
    shares = {steps: model.chosen_weights(steps, steps) for steps in (100, 2990, 3000)}
    assert [weights for weights, _ in shares.values()] == ["last", "last", "average"] and "90%" in shares[100][1]
    model = tiny.build("dino", teacher_momentum=0.996)
    assert [model.chosen_weights(steps, steps)[0] for steps in (40, 70)] == ["last", "average"]


def test_a_warm_start_keeps_its_average_and_validation_images_decide_before_the_rule() -> None:
    model = tiny.build("dino", teacher_momentum=0.999)
    model.step.fill_(10), model.total_steps.fill_(10)
    assert model.export_backbone is model.backbone
    model.backbone.config.name_or_path = "somebody/vit"  # what the average began with was trained
    assert model.export_backbone is model.teacher_backbone
    model = tiny.build("fixmatch", ema_momentum=0.999)
    model.step.fill_(10), model.total_steps.fill_(10)
    model.backbone.config.name_or_path = "somebody/vit"  # but its head was not
    assert model.export_backbone is model.backbone
    for average, last, better in ((0.6, 0.5, model.ema), (0.5, 0.6, model.backbone), (0.5, 0.5, model.ema)):
        model.validate_weights(average, last)
        assert model.export_backbone is better and "validation" in model.chosen_weights()[1]
    assert tiny.build("simclr").export_backbone is not None and tiny.build("simclr").chosen_weights() == ("last", "")
