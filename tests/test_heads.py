import pytest
import torch
from torch import nn
from transformers import ViTConfig

from hf_ssl import heads


def test_mlp_head_has_a_norm_of_its_own_after_every_layer() -> None:
    head = heads.MLPHead([4, 8, 8, 2], last_norm="affine")
    assert [type(m).__name__ for m in head] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    norms = [m for m in head if isinstance(m, nn.BatchNorm1d)]
    assert len({id(norm) for norm in norms}) == 3 and len({norm.weight.data_ptr() for norm in norms}) == 3
    assert head[0].bias is None and head[6].bias is not None


@pytest.mark.parametrize(
    ("kind", "weight", "bias"), [("affine", True, True), ("scale", True, False), ("plain", False, False)]
)
def test_last_norms(kind: str, weight: bool, bias: bool) -> None:
    head = heads.MLPHead([4, 2], last_norm=kind, last_bias=False)
    assert (head[-1].weight is not None, head[-1].bias is not None) == (weight, bias)
    output = head(torch.randn(64, 4))
    torch.testing.assert_close(output.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.std(0, correction=0), torch.ones(2), atol=1e-3, rtol=0)
    assert not any("bias" in key for key in head.state_dict()) or bias


def test_mlp_head_without_norm_or_with_one_layer() -> None:
    assert [type(m).__name__ for m in heads.MLPHead([4, 8, 2], hidden_norm=False)] == ["Linear", "ReLU", "Linear"]
    assert len(heads.MLPHead([4, 2])) == 1


def test_weight_norm_is_torchs() -> None:
    ours, theirs = heads.WeightNormLinear(5, 3), nn.utils.parametrizations.weight_norm(nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        ours.weight_g.copy_(torch.rand(3, 1) + 0.5)
        ours.weight_v.normal_()
        theirs.parametrizations.weight.original0.copy_(ours.weight_g)
        theirs.parametrizations.weight.original1.copy_(ours.weight_v)
    x = torch.randn(7, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    target = torch.randn(7, 3)
    for layer in (ours, theirs):
        (layer(x) * target).sum().backward()
    torch.testing.assert_close(ours.weight_g.grad, theirs.parametrizations.weight.original0.grad)
    torch.testing.assert_close(ours.weight_v.grad, theirs.parametrizations.weight.original1.grad)


@pytest.mark.parametrize(("layers", "norm", "kinds"), [
    (1, False, ["Linear"]),
    (2, False, ["Linear", "GELU", "Linear"]),
    (3, True, ["Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]),
])  # fmt: skip
def test_dino_head_layers(layers: int, norm: bool, kinds: list[str]) -> None:
    head = heads.DINOHead(4, 6, 8, 3, layers, norm)
    inner = head.mlp if isinstance(head.mlp, nn.Sequential) else [head.mlp]
    assert [type(m).__name__ for m in inner] == kinds
    for module in head.modules():
        heads.init_head(module)
    # unit bottleneck times unit prototypes: every logit is a cosine
    logits = head(torch.randn(9, 4))
    assert logits.shape == (9, 6) and logits.abs().max() <= 1 + 1e-5


def test_head_init() -> None:
    head = heads.DINOHead(256, 300, 256, 128)
    for module in head.modules():
        heads.init_head(module)
    for linear in (head.mlp[0], head.mlp[2], head.mlp[4]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()
    assert head.last_layer.weight_v.std().item() == pytest.approx(0.02, rel=0.05)
    assert (head.last_layer.weight_g == 1).all()
    mlp = heads.MLPHead([64, 64, 8], last_norm="scale")
    for module in mlp.modules():
        heads.init_head(module, xavier=True)
    bound = (6 / (64 + 64)) ** 0.5
    assert 0.95 * bound < mlp[0].weight.abs().max() <= bound
    assert (mlp[1].weight == 1).all() and not mlp[1].running_mean.any() and (mlp[1].running_var == 1).all()
    patches = nn.Conv2d(3, 64, 8, stride=8)  # 192 values to 64
    heads.init_head(patches, xavier=True)
    bound = (6 / (192 + 64)) ** 0.5
    assert 0.95 * bound < patches.weight.abs().max() <= bound and not patches.bias.any()


def test_head_init_spares_what_a_checkpoint_filled() -> None:
    linear = nn.Linear(4, 4)
    before = linear.weight.detach().clone()
    linear.weight._is_hf_initialized = True
    heads.init_head(linear)
    assert torch.equal(linear.weight, before) and not linear.bias.any()


def test_the_decoder_predicts_the_wanted_positions_alone() -> None:
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    decoder, tokens = heads.TransformerDecoder(4, 5, config), torch.randn(2, 6, 8)
    wanted = torch.tensor([[1, 4], [5, 2]])
    everything = decoder(tokens)
    torch.testing.assert_close(decoder(tokens, wanted), everything.gather(1, wanted[..., None].expand(-1, -1, 5)))
