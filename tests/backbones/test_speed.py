"""Networks made ready to train compute what they computed, on maps of every size."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from hf_ssl.backbones.speed import SmallMapConv2d, prepare_to_train

SHAPES = [
    (side, kernel, stride, padding)
    for side, kernel, stride, padding in itertools.product(
        ((1, 1), (1, 2), (2, 2), (4, 1), (1, 3)), ((1, 1), (2, 2), (3, 3), (3, 1), (5, 5)), (1, 2, 3), (0, 1, 2)
    )
    if all(s + 2 * padding >= k > padding for s, k in zip(side, kernel, strict=True))
]


def pair(*args, **kwargs) -> tuple[nn.Conv2d, nn.Conv2d]:
    plain = nn.Conv2d(*args, **kwargs)
    small = copy.deepcopy(plain)
    small.__class__ = SmallMapConv2d
    return plain, small


def tiny_resnet() -> nn.Module:
    config = {"embedding_size": 4, "hidden_sizes": [4, 8, 8], "depths": [1, 2, 1], "layer_type": "basic"}
    return AutoModel.from_config(AutoConfig.for_model("resnet", **config))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side,kernel,stride,padding", SHAPES)
def test_a_small_map_gives_the_convolution(side, kernel, stride, padding, bias) -> None:
    """Result and both gradients, against torch's own in float64."""
    plain, small = pair(3, 5, kernel, stride, padding, bias=bias, dtype=torch.float64)
    images = torch.randn(4, 3, *side, dtype=torch.float64, requires_grad=True)
    twins = images.detach().clone().requires_grad_()
    expected, found = plain(images), small(twins)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(twins.grad, images.grad)
    torch.testing.assert_close(small.weight.grad, plain.weight.grad)


def test_what_torch_refuses_or_takes_otherwise_stays_its_own() -> None:
    plain, small = pair(3, 5, 3)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        small(torch.randn(2, 3, 2, 2))
    plain, small = pair(3, 5, 3, padding=1)
    alone = torch.randn(3, 2, 2)
    torch.testing.assert_close(small(alone), plain(alone))


def test_the_gradient_of_a_stride_at_a_single_pixel_is_right_in_bf16() -> None:
    """torch 2.14 leaves it as the memory was; by hand it is the outer product at the kernel's centre."""
    _, small = pair(8, 16, 3, 2, 1, bias=False)
    for _ in range(8):
        small.weight.grad = None
        images, weights = torch.randn(32, 8, 1, 1), torch.randn(32, 16)
        with torch.autocast("cpu", torch.bfloat16):
            out = small(images)
        (out.flatten(1) * weights).sum().backward()
        centre = weights.T @ images.flatten(1)
        torch.testing.assert_close(small.weight.grad[:, :, 1, 1], centre, rtol=0.05, atol=0.2)
        assert not small.weight.grad.masked_fill(centre_mask(small.weight), 0).any()


def centre_mask(weight: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, :, 1, 1] = True
    return mask


def test_only_ordinary_convolutions_are_taken() -> None:
    kinds = [
        nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 1, padding=1),
    ]  # fmt: skip
    prepare_to_train(nn.Sequential(*kinds))
    assert [type(kind) is SmallMapConv2d for kind in kinds] == [True] + [False] * 5


@pytest.mark.parametrize("side", [16, 32, 64])
def test_a_resnet_prepared_to_train_computes_the_same(side) -> None:
    """ReLUs in place overwrite nothing that the gradient or the hidden states need; what is saved is the same."""
    plain = tiny_resnet().double().train()
    lean, images = copy.deepcopy(plain), torch.randn(4, 3, side, side, dtype=torch.float64)
    prepare_to_train(lean)
    activations = [module for module in lean.modules() if isinstance(module, nn.ReLU)]
    assert activations and all(module.inplace for module in activations)
    assert any(type(module) is SmallMapConv2d for module in lean.modules())
    assert lean.config.to_dict() == plain.config.to_dict() and list(lean.state_dict()) == list(plain.state_dict())
    found = [model(images, output_hidden_states=True).hidden_states for model in (plain, lean)]
    for states in found:
        sum(state.square().mean() for state in states).backward()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)
    for one, other in zip(plain.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)


def test_a_prepared_resnet_keeps_no_list_of_maxima() -> None:
    """And without a gradient its pool is the plain one."""
    plain = tiny_resnet().train()
    lean, images = copy.deepcopy(plain), torch.randn(2, 3, 32, 32)
    prepare_to_train(lean)
    kept: dict[str, set[torch.dtype]] = {}
    for name, model in (("plain", plain), ("lean", lean)):
        dtypes = kept[name] = set()

        def note(tensor: torch.Tensor, dtypes: set = dtypes) -> torch.Tensor:
            dtypes.add(tensor.dtype)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(images).last_hidden_state.sum().backward()
    assert torch.int64 in kept["plain"] and torch.int64 not in kept["lean"]
    with torch.no_grad():
        torch.testing.assert_close(lean(images).pooler_output, plain(images).pooler_output)
