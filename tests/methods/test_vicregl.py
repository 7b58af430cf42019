from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_ssl import backbones
from hf_ssl.losses import variance_and_covariance, vicreg_terms
from hf_ssl.methods.joint_embedding.vicregl import VICRegLConfig, View, by_feature, by_place, centres
from tests.contract.tiny import RESNET, VIT, batch, build, processor
from tests.invariants.test_collapse import RESNET as WIDE
from tests.invariants.test_collapse import health, train


def random_view(places: int, matches: int, images: int = 5, seed: int = 0) -> View:
    torch.manual_seed(seed)
    return View(torch.randn(images, 6), torch.randn(images, places, 4), torch.rand(images, places, 2), matches)


def nearest(first: Tensor, second: Tensor) -> tuple[list[int], list[float]]:
    """Of every row of the first the index of, and the distance to, the nearest row of the second."""
    distances = [[float((a - b).norm()) for b in second] for a in first]
    return [int(np.argmin(row)) for row in distances], [min(row) for row in distances]


def test_places_are_matched_by_feature_and_by_position() -> None:
    first, second = random_view(6, 2), random_view(4, 3, seed=1)
    mine, theirs = by_feature(first, second)
    assert torch.equal(mine, first.maps)
    for image in range(5):
        index, _ = nearest(first.maps[image], second.maps[image])
        assert torch.equal(theirs[image], second.maps[image, index])
    mine, theirs = by_place(first, second)
    assert mine.shape == theirs.shape == (5, 2, 4)  # the first's γ
    for image in range(5):
        index, distance = nearest(first.places[image], second.places[image])
        kept = sorted(np.argsort(distance)[:2])
        assert torch.equal(mine[image], first.maps[image, kept])
        assert torch.equal(theirs[image], second.maps[image, [index[k] for k in kept]])


def test_local_terms_are_the_mean_over_pairs_and_directions() -> None:
    """Of three views: (0, 1), (0, 2), (1, 0), (1, 2), all of them; the official code keeps the last pair alone."""
    model = build("vicregl")
    views = [random_view(6, 2), random_view(6, 2, seed=1), random_view(4, 3, seed=2)]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    wanted = torch.zeros(3)
    for i, j in pairs:
        for a, b in ((i, j), (j, i)):
            for match in (by_feature, by_place):
                invariance, variance, covariance = vicreg_terms(*match(views[a], views[b]))
                wanted += torch.stack([invariance, variance, covariance / 2]) / (2 * len(pairs))
    torch.testing.assert_close(torch.stack(model._local_terms(views, pairs)), wanted)


def test_global_terms_are_means_over_pairs_and_over_views() -> None:
    model = build("vicregl")
    views = [random_view(4, 2, seed=seed) for seed in range(3)]
    invariance, variance, covariance = model._whole_terms(views, [(0, 1), (0, 2), (1, 0), (1, 2)])
    a, b, c = (view.whole for view in views)
    distances = [(x - y).square().mean() for x, y in ((a, b), (a, c), (b, a), (b, c))]
    torch.testing.assert_close(invariance, torch.stack(distances).mean())
    each = [variance_and_covariance(view.whole) for view in views]
    torch.testing.assert_close(variance, torch.stack([v for v, _ in each]).mean())
    torch.testing.assert_close(covariance, torch.stack([c for _, c in each]).mean())


def test_alpha_weighs_global_and_local() -> None:
    model = build("vicregl", alpha=0.9)
    output = model(**batch("vicregl"))
    m = {name: float(value) for name, value in output.metrics.items()}
    whole, local = (25 * m[f"{p}invariance"] + 25 * m[f"{p}variance"] + m[f"{p}covariance"] for p in ("", "local_"))
    assert float(output.loss.detach()) == pytest.approx(0.9 * whole + 0.1 * local, rel=1e-5)


def test_centres_of_cells_by_hand() -> None:
    boxes = torch.tensor([[0.2, 0.1, 0.4, 0.6, 0.0], [0.2, 0.1, 0.4, 0.6, 1.0]])
    plain, mirrored = centres(boxes, (3, 2))
    rows, columns = [0.2, 0.4, 0.6], [0.3, 0.5]
    torch.testing.assert_close(plain, torch.tensor([[x, y] for y, x in product(rows, columns)]))
    torch.testing.assert_close(mirrored, torch.tensor([[x, y] for y, x in product(rows, columns[::-1])]))


def test_a_place_is_where_the_picture_has_its_pixels() -> None:
    """A picture whose red is its column and green its row: what a view shows at a cell is what its centre says."""
    y, x = np.mgrid[0:90, 0:120]
    picture = np.stack([x * 2, y * 2, np.zeros_like(x)], -1).astype(np.uint8)
    plain = {"jitter_p": 0, "grayscale_p": 0, "blur_p": 0, "solarize_p": 0, "scale": [0.1, 0.5], "size": 24}
    made = processor("vicregl", **plain, image_mean=0.0, image_std=1.0)
    views = made([picture] * 12, seed=0)
    boxes = views["pixel_values_boxes"]
    assert 0 < boxes[..., 4].mean() < 1  # mirrored ones and others
    for view in range(2):
        cells = views["pixel_values"][:, view].unfold(2, 6, 6).unfold(3, 6, 6).mean((4, 5))  # (B, 3, 4, 4)
        seen = 255 / 2 * cells[:, :2].flatten(2).mT / torch.tensor([120, 90])
        assert (seen - centres(boxes[:, view], (4, 4))).abs().max() < 0.02


@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_small_views_join_in(backbone: dict) -> None:
    colour = {"hflip": 0.5, "brightness": 0.4}
    made = processor("vicregl", views=[
        {"key": "pixel_values", "count": 2, **colour},
        {"key": "local_pixel_values", "count": 2, "size": 8, "scale": [0.08, 0.4], **colour},
    ])  # fmt: skip
    pictures = [np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8) for i in range(4)]
    views = dict(made(pictures, seed=0))
    model = build("vicregl", backbone)
    output = model(**views)
    output.loss.backward()
    assert output.loss.isfinite() and output.embeddings.shape[0] == 8
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    views.pop("local_pixel_values")
    assert model(**views).loss != output.loss


def test_one_pass_gives_whole_and_places() -> None:
    images = torch.randn(2, 3, 16, 24)
    for config in (VIT, RESNET):
        model = build("vicregl", config).eval()
        whole, places = backbones.features_and_patches(model.backbone, images)
        assert torch.equal(whole, model.features(images)) and torch.equal(places, model.patch_tokens(images))
        rows, columns = backbones.patch_grid(places.shape[1], 16, 24)
        assert rows * 3 == columns * 2
    assert backbones.patch_grid(7, 16, 16) == (1, 7)


def test_what_it_cannot_match_is_refused() -> None:
    model = build("vicregl")
    with pytest.raises(ValueError, match="needs the boxes"):
        model(torch.randn(4, 2, 3, 16, 16))
    for alpha in (0, 1):
        with pytest.raises(ValueError, match="lies between 0 and 1"):
            VICRegLConfig(backbone_config=dict(VIT), alpha=alpha)


def test_a_short_run_spreads_whole_views_and_places() -> None:
    model, logged = train("vicregl", 0, WIDE)
    spread, rank = health(model)  # seen: 0.73 and 31; untrained 0.30 and 18
    assert spread > 0.5 and rank > 22
    for name in ("variance", "local_variance"):  # seen: 0.95 to 0.32 and 1.94 to 1.25
        assert logged[-1][name] < 0.85 * logged[0][name]
