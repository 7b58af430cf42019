import pytest
import torch

from hf_ssl import masks


def test_random_masking_by_hand() -> None:
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    keep, restore, mask = masks.random_masking(noise, 2)
    assert keep.tolist() == [[1, 3]]  # the two of lowest noise, lowest first
    assert restore.tolist() == [[3, 0, 2, 1]]
    assert mask.tolist() == [[1, 0, 1, 0]]


def test_every_patch_is_masked_equally_often_the_last_row_and_column_included() -> None:
    _, _, mask = masks.random_masking(torch.rand(20_000, 16), 4)
    assert (mask.sum(1) == 12).all()
    assert torch.allclose(mask.mean(0), torch.full((16,), 0.75), atol=0.015)


@pytest.mark.parametrize("keep", [0, 4])
def test_a_mask_of_nothing_or_everything_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 3 of 4 patches"):
        masks.random_masking(torch.rand(1, 4), keep)


def test_patchify_by_hand_and_back() -> None:
    image = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    patches = masks.patchify(image, 2)
    assert patches.shape == (1, 6, 8)
    # second patch of the first row: rows 0–1, columns 2–3, channels innermost
    assert patches[0, 1].tolist() == [2, 26, 3, 27, 8, 32, 9, 33]
    assert torch.equal(masks.unpatchify(patches, 2, 4, 6), image)
    with pytest.raises(ValueError, match="no multiple of the patch size 4"):
        masks.patchify(image, 4)


def test_normalised_patches_use_the_unbiased_variance() -> None:
    patch = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])  # mean 3, variance 14/3
    wanted = (patch - 3) / (14 / 3 + 1e-6) ** 0.5
    torch.testing.assert_close(masks.normalise_patches(patch), wanted)
    assert not masks.normalise_patches(torch.ones(1, 1, 4)).any()  # a flat patch: zeros, not NaN
