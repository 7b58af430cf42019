"""A prepared ViT's class token is the native one, and so is its gradient; all else it gives stays what it was."""

import copy

import pytest
import torch
from torch import nn
from transformers import ViTConfig

from hf_ssl import backbones
from hf_ssl.backbones import prepare_to_train

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def pair(attention: str = "sdpa", **fields) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    config = ViTConfig(**SMALL, **fields)
    config._attn_implementation = attention
    native = backbones.build(config).double().train()
    prepared = copy.deepcopy(native)
    prepare_to_train(prepared)
    return native, prepared


def images(side: int = 16) -> torch.Tensor:
    return torch.randn(3, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize("side", [16, 24])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_feature_and_its_gradient_are_the_native_ones(attention: str, side: int) -> None:
    native, prepared = pair(attention)
    pictures = images(side)
    found = [backbones.features(model, pictures) for model in (native, prepared)]
    torch.testing.assert_close(found[1], found[0])
    weights = torch.randn_like(found[0])
    for feature in found:
        (feature * weights).sum().backward()
    for (name, one), other in zip(native.named_parameters(), prepared.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, name
        else:
            torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_the_last_block_computes_one_token() -> None:
    _, prepared = pair()
    seen: list[int] = []
    prepared.layers[-1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    backbones.features(prepared, images())
    backbones.patch_tokens(prepared, images())
    assert seen == [1, 17]


def test_all_else_is_what_it_was() -> None:
    native, prepared = pair()
    pictures, keep = images(), torch.tensor([[1, 5, 7]] * 3)
    for model in (native, prepared):
        backbones.make_maskable(model)
    with torch.no_grad():
        backbones.features(prepared, pictures)
        for ask in (
            backbones.patch_tokens, backbones.last_attention, lambda m, x: backbones.visible_tokens(m, x, keep),
            lambda m, x: m(x).last_hidden_state, lambda m, x: backbones.features_and_patches(m, x)[0],
            lambda m, x: torch.stack(m(x, output_hidden_states=True).hidden_states),
        ):  # fmt: skip
            torch.testing.assert_close(ask(prepared, pictures), ask(native, pictures), rtol=0, atol=0)
        visible = [backbones.visible_features(model, pictures, keep) for model in (native, prepared)]
        torch.testing.assert_close(visible[1], visible[0])
    assert list(prepared.state_dict()) == list(native.state_dict())


def test_a_copy_has_a_block_of_its_own() -> None:
    """A teacher copied from a prepared student must not run the student's weights."""
    _, prepared = pair()
    twin = copy.deepcopy(prepared)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not backbones.features(twin, images()).any()
    assert twin.layers[-1].forward.__self__ is twin.layers[-1]


def test_a_checkpointed_block_is_computed_whole() -> None:
    """It runs again in the backward pass, when the class token alone is no longer asked for."""
    native, prepared = pair()
    prepared.gradient_checkpointing_enable()
    pictures = images()
    for model in (native, prepared):
        backbones.features(model, pictures).sum().backward()
    torch.testing.assert_close(prepared.embeddings.cls_token.grad, native.embeddings.cls_token.grad)


def test_an_error_in_between_leaves_nothing_behind() -> None:
    _, prepared = pair()
    with pytest.raises(RuntimeError), backbones.class_token_alone(prepared):
        raise RuntimeError
    assert backbones.patch_tokens(prepared, images()).shape == (3, 16, 24)


def test_dropout_still_falls_on_what_is_left() -> None:
    _, prepared = pair(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    pictures = images()
    assert not torch.equal(backbones.features(prepared, pictures), backbones.features(prepared, pictures))
    prepared.eval()
    torch.testing.assert_close(backbones.features(prepared, pictures), backbones.features(prepared, pictures))
