"""Every family of backbones through one set of functions: features, patch tokens, attention, masks, positions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel, TimmWrapperConfig

from hf_ssl import backbones
from hf_ssl.methods.joint_embedding.simclr import SimCLRConfig, SimCLRForPreTraining

_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_TINY = {  # name -> (config, width D, patch tokens of a 32×32 picture)
    "vit": ({**_VIT, "intermediate_size": 32}, 16, 16),
    "deit": ({**_VIT, "intermediate_size": 32}, 16, 16),
    "dinov2": ({**_VIT, "mlp_ratio": 2}, 16, 16),
    "dinov2_with_registers": ({**_VIT, "mlp_ratio": 2, "num_register_tokens": 3}, 16, 16),
    "dinov3_vit": ({**_VIT, "intermediate_size": 32, "num_register_tokens": 2}, 16, 16),
    "vit_msn": ({**_VIT, "intermediate_size": 32}, 16, 16),
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}, 12, 16),
    "convnextv2": ({"hidden_sizes": [4, 6, 8, 12], "depths": [1, 1, 1, 1], "image_size": 32}, 12, 1),
    "swin": (
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 32, "patch_size": 4},
        16,
        16,
    ),
    "timm_resnet": ({"architecture": "test_resnet"}, None, None),
    "timm_vit": ({"architecture": "test_vit", "model_args": {"img_size": 32}}, None, 4),
    "timm_swin": (
        {
            "architecture": "swin_tiny_patch4_window7_224",
            "model_args": {"img_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        },
        16,
        16,
    ),
}  # fmt: skip
_WITH_CLS = ["vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_msn"]
_MASKABLE = ["vit", "deit", "dinov2", "dinov2_with_registers", "vit_msn"]


def tiny_config(name: str, channels: int = 3):
    fields = copy.deepcopy(_TINY[name][0])
    if name.startswith("timm"):
        return TimmWrapperConfig(**{**fields, "model_args": {**fields.get("model_args", {}), "in_chans": channels}})
    return AutoConfig.for_model(name, num_channels=channels, **fields)


def tiny(name: str, channels: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    return backbones.build(tiny_config(name, channels)).eval()


@pytest.mark.parametrize("name", _TINY)
def test_features_patches_and_a_round_trip(name: str, tmp_path) -> None:
    model, images = tiny(name), torch.randn(2, 3, 32, 32)
    width, patches = _TINY[name][1:]
    dim = backbones.feature_dim(model)
    assert width in (None, dim)
    with torch.no_grad():
        features, tokens = backbones.features(model, images), backbones.patch_tokens(model, images)
        assert features.shape == (2, dim) and features.std() > 0
        assert tokens.ndim == 3 and tokens.shape[::2] == (2, dim) and patches in (None, tokens.shape[1])
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        torch.testing.assert_close(backbones.features(again, images), features, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", _TINY)
def test_no_parameter_is_left_without_gradient(name: str) -> None:
    """A learned pooler that no method trains would be exported as noise and break DDP."""
    model = tiny(name).train()
    (backbones.features(model, torch.randn(4, 3, 32, 32)) ** 2).sum().backward()
    silent = {key for key, parameter in model.named_parameters() if parameter.grad is None} - {"embeddings.mask_token"}
    assert not silent


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3_vit", "resnet", "convnextv2", "swin", "timm_resnet"])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_channels(name: str, channels: int) -> None:
    with torch.no_grad():
        assert backbones.features(tiny(name, channels), torch.randn(2, channels, 32, 32)).shape[0] == 2


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3_vit", "resnet", "swin"])
def test_other_sizes(name: str) -> None:
    with torch.no_grad():
        model = tiny(name)
        small = backbones.patch_tokens(model, torch.randn(1, 3, 16, 16)).shape[1]
        assert backbones.patch_tokens(model, torch.randn(1, 3, 16, 48)).shape[1] == 3 * small


def test_patch_tokens_run_row_by_row() -> None:
    """Patch i of the ViT, and pixel i of a feature map, look at row i // columns and column i % columns."""
    for name in ("vit", "resnet", "swin", "timm_swin"):
        model = tiny(name)
        plain = torch.zeros(1, 3, 32, 32)
        marked = plain.clone()
        marked[..., 8:16, 24:32] = 3.0  # row 1, column 3 of a 4×4 grid
        with torch.no_grad():
            change = (backbones.patch_tokens(model, marked) - backbones.patch_tokens(model, plain)).norm(dim=-1)[0]
        assert int(change.argmax()) == 1 * 4 + 3, name


@pytest.mark.parametrize("name", _WITH_CLS)
def test_features_are_the_class_token_after_the_final_norm(name: str) -> None:
    model, images = tiny(name), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbones.features(model, images), model(images).last_hidden_state[:, 0])


@pytest.mark.parametrize("name", ["resnet", "convnextv2", "swin", "timm_swin"])
def test_features_without_a_class_token_average_the_patches(name: str) -> None:
    model, images = tiny(name), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        mean, features = backbones.patch_tokens(model, images).mean(1), backbones.features(model, images)
    if name == "convnextv2":  # its own pooling norms the average
        mean = F.layer_norm(mean, mean.shape[-1:], eps=model.config.layer_norm_eps)
    torch.testing.assert_close(features, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", _WITH_CLS)
def test_last_attention_by_hand(name: str) -> None:
    model, images = tiny(name), torch.randn(2, 3, 32, 32)
    before = model.config._attn_implementation
    with torch.no_grad():
        attention = backbones.last_attention(model, images)
        features = backbones.features(model, images)
    assert attention.shape == (2, 2, 16) and (attention > 0).all() and (attention.sum(-1) < 1).all()
    assert model.config._attn_implementation == before
    if name == "vit":
        seen = {}
        layer = model.layers[-1]
        hook = layer.layernorm_before.register_forward_hook(lambda module, args, out: seen.update(x=out))
        with torch.no_grad():
            assert torch.equal(backbones.features(model, images), features)
            q, k = (
                proj(seen["x"]).unflatten(-1, (2, 8)).transpose(1, 2)
                for proj in (layer.attention.q_proj, layer.attention.k_proj)
            )
            by_hand = (q[:, :, :1] @ k.transpose(2, 3) / 8**0.5).softmax(-1)[:, :, 0, 1:]
        hook.remove()
        torch.testing.assert_close(attention, by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet", "swin", "timm_vit"])
def test_no_attention_is_said_in_words(name: str) -> None:
    with pytest.raises(ValueError, match="no class token"):
        backbones.last_attention(tiny(name), torch.randn(1, 3, 32, 32))


# --- visible tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _MASKABLE)
def test_keeping_all_patches_is_a_no_op_and_fewer_are_what_was_asked(name: str) -> None:
    model, images = tiny(name), torch.randn(2, 3, 32, 32)
    prefix = backbones.num_prefix_tokens(model)
    with torch.no_grad():
        plain = model(images).last_hidden_state
        backbones.make_maskable(model)
        assert torch.equal(model(images).last_hidden_state, plain)
        everything = torch.arange(16).expand(2, -1)
        torch.testing.assert_close(backbones.visible_tokens(model, images, everything), plain, rtol=1e-5, atol=5e-6)
        order = torch.stack([torch.randperm(16), torch.randperm(16)])
        shuffled = backbones.visible_tokens(model, images, order)
        wanted = plain[:, prefix:].gather(1, order[..., None].expand(-1, -1, 16))
        torch.testing.assert_close(shuffled[:, prefix:], wanted, rtol=1e-4, atol=1e-5)
        few = backbones.visible_tokens(model, images, order[:, :4])
        assert few.shape == (2, prefix + 4, 16)
        hidden = images.clone()  # pictures that differ only where nothing is visible give the same tokens
        for row, kept in zip(hidden, order[:, :4].tolist(), strict=True):
            for patch in set(range(16)) - set(kept):
                row[:, patch // 4 * 8 : patch // 4 * 8 + 8, patch % 4 * 8 : patch % 4 * 8 + 8] = 9.0
        assert torch.equal(backbones.visible_tokens(model, hidden, order[:, :4]), few)
        assert torch.equal(model(images).last_hidden_state, plain)  # nothing lingers


@pytest.mark.parametrize("name", ["dinov3_vit", "resnet", "swin", "timm_vit"])
def test_what_cannot_be_masked_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot encode visible patches"):
        backbones.make_maskable(tiny(name))


# --- positions ----------------------------------------------------------------------------------------------------


def test_sincos_by_hand() -> None:
    table = backbones.sincos_2d(8, (2, 3), prefix=1)
    assert table.shape == (7, 8) and not table[0].any()
    x, y = 2.0, 1.0  # the last patch; frequencies 1 and 1/100
    angles = torch.tensor([[x, x / 100], [y, y / 100]])
    assert torch.allclose(table[-1], torch.cat([angles.sin(), angles.cos()], dim=1).flatten())
    assert len(table.unique(dim=0)) == 7
    with pytest.raises(ValueError, match="divisible by 4"):
        backbones.sincos_2d(6, 2)


def test_positions_resize_as_transformers_does_and_with_the_offset_of_dino() -> None:
    model = tiny("vit")
    table = model.embeddings.position_embeddings
    native = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 12, 16), 16, 48)
    torch.testing.assert_close(backbones.interpolate_positions(table, (2, 6)), native)
    assert backbones.interpolate_positions(table, (4, 4), offset=0.1) is table
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        plain = backbones.features(model, images)
        twin = copy.deepcopy(model)
        backbones.set_position_offset(twin, 0.1)
        shifted = backbones.features(twin, images)
        assert not torch.allclose(plain, shifted, atol=1e-4)
        assert torch.equal(backbones.features(model, images), plain)
        copied = copy.deepcopy(twin)  # reads its own table, not the one it was copied from
        twin.embeddings.position_embeddings.zero_()
        assert torch.equal(backbones.features(copied, images), shifted)


def test_a_table_that_is_not_square_serves_its_own_size() -> None:
    fields = {**_TINY["vit"][0], "image_size": [16, 32]}
    model = backbones.build(AutoConfig.for_model("vit", **fields)).eval()
    images = torch.randn(2, 3, 16, 32)
    with torch.no_grad():
        assert torch.equal(backbones.features(model, images), model(images).last_hidden_state[:, 0])


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", backbones.PRESETS)
def test_presets_are_configs_that_build(name: str) -> None:
    config = AutoConfig.for_model(**backbones.from_preset(name, num_channels=1))
    with torch.device("meta"):
        assert backbones.feature_dim(backbones.build(config)) > 0


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(KeyError, match="vit-nano"):
        backbones.from_preset("vit-gigantic")


def test_sizes() -> None:
    assert backbones.patch_size(tiny_config("vit")) == 8 and backbones.image_size(tiny_config("vit")) == (32, 32)
    with pytest.raises(ValueError, match="no patches"):
        backbones.patch_size(tiny_config("resnet"))


@pytest.mark.parametrize("name", ["timm_resnet", "dinov3_vit", "swin"])
def test_inside_a_method_config_and_weights_round_trip(name: str, tmp_path) -> None:
    config = SimCLRConfig(backbone_config=tiny_config(name), projection_dim=8, hidden_dim=8)
    model = SimCLRForPreTraining(config).eval()
    model.save_pretrained(tmp_path)
    again, report = SimCLRForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.features(images), again.features(images))


def test_views_in_one_pass_or_in_a_pass_each() -> None:
    """Joint statistics are those of all views together, by hand; apart, those of each view."""
    views = torch.randn(4, 2, 5)
    norm = torch.nn.BatchNorm1d(5, affine=False)
    whole = views.transpose(0, 1).reshape(8, 5)
    by_hand = (whole - whole.mean(0)) / (whole.var(0, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(backbones.over_views(norm, views), by_hand)
    apart = [(v - v.mean(0)) / (v.var(0, correction=0) + norm.eps).sqrt() for v in (views[:, 0], views[:, 1])]
    torch.testing.assert_close(backbones.over_views(norm, views, joint=False), torch.cat(apart))


def test_views_are_not_copied_and_stay_channels_last() -> None:
    views = torch.randn(2, 2, 8, 8, 3).movedim(-1, -3)
    seen = []
    order = backbones.over_views(lambda images: seen.append(images) or images.mean((1, 2, 3)), views)
    assert seen[0].data_ptr() == views.data_ptr() and seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(order, views.mean((2, 3, 4)).T.flatten())  # view by view


def test_only_visible_patches_are_embedded() -> None:
    """What a mask removes costs nothing and has no gradient; what stays is the plain embedding."""
    model, images = tiny("vit"), torch.randn(2, 3, 32, 32)
    backbones.make_maskable(model)
    keep = torch.tensor([[3, 0, 9], [15, 2, 7]])
    projection = model.embeddings.patch_embeddings.projection
    plain = projection(images).flatten(2).transpose(1, 2)
    projection.visible_patches = keep
    embedded = projection(images).flatten(2).transpose(1, 2)
    places = keep[..., None].expand(-1, -1, plain.shape[-1])
    torch.testing.assert_close(embedded.gather(1, places), plain.gather(1, places), rtol=1e-5, atol=5e-6)
    assert (embedded.abs().sum(-1) > 0).sum() == keep.numel()
