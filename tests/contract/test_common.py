"""transformers' common model tests, to the same effect, over every method: one tiny model of each, shared.

Elsewhere: gradient checkpointing, config round trip, other image sizes, determinism (``test_methods``), the dtype
argument (``test_dtype``), what plain transformers loads (``test_export``).
"""

import copy
import io
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ssl.backbones import prepare_to_train
from hf_ssl.methods import METHODS, load
from hf_ssl.modeling import SSLModel
from tests.contract.tiny import DINOV2, RESNET, TINY, adamw, batch, build, make_config, train_step

every_method = pytest.mark.parametrize("name", sorted(METHODS))


@cache
def shared(name: str) -> SSLModel:
    """For reading only, in evaluation mode."""
    return build(name).eval()


@cache
def views(name: str) -> dict[str, Tensor]:
    return batch(name)


@cache
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def assert_same(model: SSLModel, other: SSLModel) -> None:
    expected = other.state_dict()
    assert list(model.state_dict()) == list(expected)
    for key, value in model.state_dict().items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key
    with torch.no_grad():
        assert torch.equal(model(images()).embeddings, other(images()).embeddings)


# --- saving and loading -------------------------------------------------------------------------------------------


@every_method
def test_saved_whole_and_in_shards(name: str, tmp_path: Path) -> None:
    model = shared(name)
    for folder, options in ("whole", {}), ("shards", {"max_shard_size": "20KB"}):
        model.save_pretrained(tmp_path / folder, **options)
        again, report = load(name).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        assert_same(again, model)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


@every_method
def test_device_map(name: str, tmp_path: Path) -> None:
    shared(name).save_pretrained(tmp_path)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        assert_same(load(name).from_pretrained(tmp_path, device_map=device_map), shared(name))


@every_method
def test_weights_that_the_caller_holds(name: str) -> None:
    """``from_pretrained(None, ...)`` reads nothing, and a config alone is an error in a sentence."""
    model = load(name).from_pretrained(None, config=make_config(name), state_dict=shared(name).state_dict())
    assert_same(model, shared(name))
    with pytest.raises(ValueError, match="config"):
        load(name).from_pretrained(None)


@every_method
def test_copied_and_pickled_ready_to_train(name: str) -> None:
    """As SSLTrainer prepares it; a copy shares no storage and trains without the original."""
    model = build(name)
    prepare_to_train(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False):
        assert_same(twin.eval(), model.eval())
        assert {type(module) for module in twin.modules()} == {type(module) for module in model.modules()}
        loss = train_step(twin.train(), adamw(twin), views(name))
        assert loss.isfinite() and any(not torch.equal(v, kept[k]) for k, v in twin.state_dict().items())
        assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


def test_positions_with_an_offset_are_copied_and_pickled() -> None:
    model = build("dino", interpolate_offset=0.1).eval()
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        large = torch.randn(2, 3, 24, 24)
        assert torch.equal(twin(large).embeddings, model(large).embeddings)
        with torch.no_grad():
            twin.export_backbone.embeddings.position_embeddings.zero_()
        assert not torch.equal(twin(large).embeddings, model(large).embeddings)  # its own table


# --- initialisation -----------------------------------------------------------------------------------------------


@every_method
def test_all_that_a_checkpoint_lacks_is_initialised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing at all: as the constructor makes it, parameters and buffers, saved ones and others."""
    original = PreTrainedModel._initialize_weights

    def seeded(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        torch.manual_seed(0)  # for each module: building on the meta device draws nothing before
        original(self, module, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", seeded)
    wanted = load(name)(make_config(name))
    empty = load(name).from_pretrained(None, config=make_config(name), state_dict={})
    expected = dict(wanted.named_parameters()) | dict(wanted.named_buffers())
    for key, value in (dict(empty.named_parameters()) | dict(empty.named_buffers())).items():
        assert not value.is_meta and torch.equal(value, expected[key]), key


@every_method
def test_one_seed_one_model(name: str) -> None:
    assert_same(build(name).eval(), shared(name))
    other = build(name, seed=1).eval()
    assert not torch.equal(other(images()).embeddings, shared(name)(images()).embeddings)


# --- what forward takes and returns -------------------------------------------------------------------------------


@every_method
def test_a_tuple_is_the_same_without_names(name: str) -> None:
    model = copy.deepcopy(shared(name))
    outputs: list[Any] = []
    for inputs in ({"pixel_values": images(), "output_hidden_states": True}, views(name)):
        for options in ({}, {"return_dict": True}, {"return_dict": False}):
            torch.manual_seed(0)
            outputs.append(copy.deepcopy(model)(**inputs, **options))
    for named, same, bare in (outputs[:3], outputs[3:]):
        assert isinstance(bare, tuple) and list(named) == list(same) and len(bare) == len(named.to_tuple())
        torch.testing.assert_close(bare, named.to_tuple(), rtol=0, atol=0)
    model.config.return_dict = False
    assert isinstance(model(images()), tuple)


@every_method
def test_hidden_states_and_attentions(name: str) -> None:
    """Those of the exported backbone, with gradient; the embedding is what it is without them."""
    model = copy.deepcopy(shared(name))
    model.set_attn_implementation("eager")
    output = model(images(), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 17, 16)] * 3
    assert [tuple(each.shape) for each in output.attentions] == [(2, 2, 17, 17)] * 2
    torch.testing.assert_close(output.embeddings, model(images()).embeddings, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.attentions[-1].sum(-1), torch.ones(2, 2, 17))
    if any(parameter.requires_grad for parameter in model.export_backbone.parameters()):
        for each in (output.hidden_states[0], output.attentions[0]):
            each.retain_grad()
        output.embeddings.square().sum().backward()
        assert output.hidden_states[0].grad.abs().max() > 0 and output.attentions[0].grad.abs().max() > 0
    assert "hidden_states" not in model(images()) and "attentions" not in model(images())
    model.config.output_hidden_states = True
    assert len(model(images()).hidden_states) == 3
    assert "hidden_states" not in model(**views(name))  # a training batch: passes of several views and sizes


@pytest.mark.parametrize("name", [name for name, tiny in sorted(TINY.items()) if tiny.takes_resnet])
def test_a_network_without_attention_takes_the_same_arguments(name: str) -> None:
    output = build(name, RESNET).eval()(images(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and output.attentions is None


@every_method
def test_attention_implementations_agree(name: str, tmp_path: Path) -> None:
    shared(name).save_pretrained(tmp_path)
    results = []
    for implementation in ("eager", "sdpa"):
        model = load(name).from_pretrained(tmp_path, attn_implementation=implementation).train()
        chosen = {m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)}
        assert chosen == {implementation}
        loss = model(**views(name)).loss
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((model.eval()(images()).embeddings.detach(), loss.detach(), gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * float(one.abs().max()))


@every_method
def test_an_image_does_not_see_its_batch(name: str) -> None:
    model = shared(name)
    with torch.no_grad():
        together = model(images(), output_hidden_states=True)
        for row in range(2):
            alone = model(images()[row : row + 1], output_hidden_states=True)
            torch.testing.assert_close(alone.embeddings[0], together.embeddings[row], rtol=1e-4, atol=1e-6)
            last = (each.hidden_states[-1] for each in (alone, together))
            torch.testing.assert_close(next(last)[0], next(last)[row], rtol=1e-4, atol=1e-5)


@every_method
def test_input_embeddings(name: str) -> None:
    """The patch embedding, or CLIP's table of tokens, as the native model has it; it can be set."""
    model = copy.deepcopy(shared(name))
    found = model.get_input_embeddings()
    assert any(found is module for module in model.backbone.modules())
    twin = copy.deepcopy(found)
    model.set_input_embeddings(twin)
    assert model.get_input_embeddings() is twin
    assert torch.equal(model(images()).embeddings, shared(name)(images()).embeddings)


@pytest.mark.parametrize("name", ["dino", "dinov2", "simclr", "fixmatch"])
def test_other_backbones_keep_the_contract(name: str, tmp_path: Path) -> None:
    model = build(name, DINOV2).eval()
    model.save_pretrained(tmp_path)
    assert_same(load(name).from_pretrained(tmp_path), model)
    assert_same(pickle.loads(pickle.dumps(model)), model)
    assert len(model(images(), output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("name", ["simclr", "mae"])
def test_a_compiled_model_gives_the_same(name: str) -> None:
    """Traced by dynamo, run without a compiler; in one graph with a torch that traces our context managers."""
    model = copy.deepcopy(shared(name))
    one_graph = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)  # seen; 2.8 breaks it there
    compiled = torch.compile(model, backend="eager", fullgraph=one_graph)
    torch.testing.assert_close(compiled(images()).embeddings, model(images()).embeddings)
    torch._dynamo.reset()
