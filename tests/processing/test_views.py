"""What is drawn: crop statistics against torchvision, probabilities, seeds, and the checks of a group's fields."""

import hashlib
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop, v2

from hf_ssl.processing.views import Draw, ViewGroup, centre_box, draw_view, shrink


def group(**fields) -> ViewGroup:
    return ViewGroup.from_dict(fields, (32, 32))


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(375, 500, (0.08, 1.0)), (64, 64, (0.2, 1.0)), (60, 300, (0.4, 1.0))]
)
def test_crops_are_distributed_as_in_torchvision(height, width, scale):
    rng, recipe = np.random.default_rng(0), group(scale=list(scale))
    ours = np.array([draw_view(recipe, height, width, rng).box for _ in range(4000)], dtype=np.float64)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)], float)

    def statistics(boxes):
        area = boxes[:, 2] * boxes[:, 3] / (height * width)
        aspect = np.log(boxes[:, 3] / boxes[:, 2])
        slack = np.maximum(height - boxes[:, 2], 1), np.maximum(width - boxes[:, 3], 1)
        return area, aspect, boxes[:, 0] / slack[0], boxes[:, 1] / slack[1]

    for mine, other in zip(statistics(ours), statistics(theirs), strict=True):
        every = np.sort(np.concatenate([mine, other]))
        gap = np.abs(np.searchsorted(np.sort(mine), every, "right") - np.searchsorted(np.sort(other), every, "right"))
        assert gap.max() / 4000 < 0.043  # two-sample Kolmogorov-Smirnov, p about .001
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


def test_no_fitting_box_takes_the_centre():
    recipe = group(scale=[1.0, 1.0], ratio=[0.75, 4 / 3])
    assert draw_view(recipe, 20, 100, np.random.default_rng(0)).box == (0, 36, 20, 27)
    assert centre_box(100, 20, (0.75, 4 / 3)) == (36, 0, 27, 20)
    assert draw_view(group(scale=None), 50, 80, np.random.default_rng(0)).box == (0, 15, 50, 50)
    assert draw_view(group(scale=None, size=[10, 20]), 50, 80, np.random.default_rng(0)).box == (5, 0, 40, 80)
    assert draw_view(group(), 1, 1, np.random.default_rng(0)).box == (0, 0, 1, 1)


def test_probabilities_and_ranges():
    recipe = group(hflip=0.5, vflip=0.1, jitter_p=0.8, brightness=0.4, saturation=[0.5, 0.6], hue=0.1, grayscale_p=0.2,
                   blur_p=0.3, solarize_p=0.25, erase_p=0.4, rotation=10, translate=0.125)  # fmt: skip
    rng = np.random.default_rng(0)
    draws = [draw_view(recipe, 64, 64, rng) for _ in range(4000)]

    def share(flags):
        return sum(map(bool, flags)) / 4000

    for flags, p in [
        ([d.hflip for d in draws], 0.5), ([d.vflip for d in draws], 0.1), ([d.jitter for d in draws], 0.8),
        ([d.gray for d in draws], 0.2), ([d.sigma for d in draws], 0.3), ([d.solarize for d in draws], 0.25),
        ([d.erase for d in draws], 0.4),
    ]:  # fmt: skip
        assert abs(share(flags) - p) < 0.03, p
    factors = [dict(d.jitter) for d in draws if d.jitter]
    for name, low, high in [("brightness", 0.6, 1.4), ("saturation", 0.5, 0.6), ("hue", -0.1, 0.1)]:
        values = [f[name] for f in factors]
        assert low <= min(values) < low + 0.01 * (high - low)
        assert high >= max(values) > high - 0.01 * (high - low)
    assert {f["contrast"] for f in factors} == {1.0}
    orders = {tuple(name for name, _ in d.jitter) for d in draws if d.jitter}
    assert len(orders) == 24
    assert 9.9 < max(d.rotation for d in draws) <= 10
    assert {d.shift[0] for d in draws} == set(range(-4, 5))
    areas = [d.erase[2] * d.erase[3] / 1024 for d in draws if d.erase]
    assert 0.015 < min(areas) < max(areas) < 0.35
    crops = [d.box[2] * d.box[3] for d in draws if d.erase]
    assert abs(np.corrcoef(areas, crops)[0, 1]) < 0.1  # two draws, not one


def test_jitter_and_blur_are_distributed_as_in_torchvision_v2():
    """Each factor by a two-sample Kolmogorov-Smirnov test (p about .001), the 24 orders by chi-square (p .001)."""
    rng, n = np.random.default_rng(1), 3000
    recipe = group(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur_p=1.0)
    draws = [draw_view(recipe, 64, 64, rng) for _ in range(n)]
    torch.manual_seed(1)
    colour, gauss = v2.ColorJitter(0.8, 0.8, 0.8, 0.2), v2.GaussianBlur(23, (0.1, 2.0))
    others = [colour.make_params([]) for _ in range(n)]
    names = ("brightness", "contrast", "saturation", "hue")
    pairs = {name: ([dict(d.jitter)[name] for d in draws], [o[f"{name}_factor"] for o in others]) for name in names}
    pairs["sigma"] = [d.sigma for d in draws], [gauss.make_params([])["sigma"][0] for _ in range(n)]
    for name, (mine, other) in pairs.items():
        mine, other = np.sort(mine), np.sort(other)
        every = np.concatenate([mine, other])
        gap = np.abs(np.searchsorted(mine, every, "right") - np.searchsorted(other, every, "right")).max() / n
        assert gap < 1.95 * np.sqrt(2 / n), (name, gap)
    ours = Counter(tuple(names.index(name) for name, _ in d.jitter) for d in draws)
    theirs = Counter(tuple(o["fn_idx"].tolist()) for o in others)
    assert sum((ours[k] - theirs[k]) ** 2 / (ours[k] + theirs[k]) for k in ours | theirs) < 49.7  # 23 degrees


def test_a_view_says_by_how_much_it_shrinks():
    assert shrink(Draw((5, 5, 64, 48)), group(size=[32, 16])) == 2
    assert shrink(Draw((5, 5, 8, 48)), group(size=16)) == 0.5
    assert shrink(Draw((5, 5, 64, 64)), group(size=16, interpolation="nearest")) == 1


def test_a_single_number_means_what_it_means_in_torchvision():
    recipe = group(brightness=1.5, contrast=0.4, saturation=[0.2, 3], hue=0.1)
    assert recipe.brightness == (0.0, 2.5)
    assert recipe.contrast == pytest.approx((0.6, 1.4))
    assert recipe.saturation == (0.2, 3.0)
    assert recipe.hue == (-0.1, 0.1)
    assert [group(size=s, blur_kernel=0.1).kernel_pixels for s in (224, 96, 32)] == [23, 9, 3]
    assert group(size=224).kernel_pixels == 0


def test_one_field_does_not_move_the_draws_of_another():
    plain, changed = group(hflip=0.5, scale=[0.2, 0.5]), group(hflip=0.5, scale=[0.2, 0.5], blur_p=1.0, erase_p=1.0)
    first, second = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(20):
        a, b = draw_view(plain, 60, 70, first), draw_view(changed, 60, 70, second)
        assert (a.box, a.hflip) == (b.box, b.hflip)
        assert b.sigma
        assert not a.sigma


def rounded(value):
    if isinstance(value, (tuple, list)):
        return [rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("fields", "digest"),
    [
        (dict(hflip=0.5, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grayscale_p=0.2,
              blur_p=0.5, blur_kernel=0.1), "169d11d56327ef8a"),
        (dict(size=20, scale=[0.05, 0.4], hflip=0.5, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1,
              jitter_p=0.8, grayscale_p=0.2, blur_p=0.5, solarize_p=0.2), "730e53032f25387e"),
        (dict(scale=None, hflip=0.5, rotation=15, translate=0.125, erase_p=0.5), "8b4d6dc8d4eba0cc"),
    ],
)  # fmt: skip
def test_a_recipe_draws_what_it_drew_before_randaugment_was_there(fields, digest):
    """Digests of 50 draws made at commit 5e8312a; RandAugment and Cutout add to these draws and change none."""
    strong = {**fields, "randaugment": 2, "cutout": 0.5}
    old, new = np.random.default_rng(11), np.random.default_rng(11)
    drawn = [draw_view(group(**fields), 60, 70, old) for _ in range(50)]
    assert hashlib.sha256(json.dumps([rounded(d[:10]) for d in drawn]).encode()).hexdigest()[:16] == digest
    assert old.random() == np.random.default_rng(11).random(50 * 100 + 1)[-1]
    assert not any(d.randaugment or d.cutout for d in drawn)
    assert draw_view(group(**strong), 60, 70, new)[:10] == drawn[0][:10]
    assert new.random() == np.random.default_rng(11).random(100 + 2 + 8 + 1)[-1]


def test_a_strong_view_takes_numbers_by_its_operations_alone():
    def drawn(**fields):
        rng = np.random.default_rng(5)
        draw = draw_view(group(**fields), 60, 70, rng)
        return draw.randaugment, draw.cutout, rng.random()

    both = drawn(randaugment=2, randaugment_p=1.0, cutout=0.5)
    assert drawn(randaugment=2, randaugment_p=1.0) == (both[0], None, both[2])
    assert drawn(randaugment=2, randaugment_p=0.0, randaugment_magnitude=3, cutout=0.5) == ((), *both[1:])
    more = drawn(randaugment=5, randaugment_p=1.0, cutout=0.5)
    assert (more[0][:2], more[1]) == both[:2]
    assert drawn(cutout=0.5)[1] == both[1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"brightnes": 0.4}, ["unknown field 'brightnes'", "Did you mean 'brightness'?"]),
        ({"flip": 0.5}, ["'flip'", "Did you mean 'hflip'?"]),
        ({"hflip": 1.5}, ["hflip must be a probability from 0 to 1, not 1.5"]),
        ({"scale": [1, 0.5]}, ["scale must be [low, high]"]),
        ({"scale": 0.5}, ["scale must be [low, high]"]),
        ({"count": -1}, ["count must be a whole number from 0 up, not -1"]),
        ({"count": True}, ["count must be"]),
        ({"hue": 0.7}, ["hue must be a number from 0 to .5"]),
        ({"hue": float("nan")}, ["hue must be"]),
        ({"brightness": "0.4"}, ["brightness must be"]),
        ({"size": [32, 32, 3]}, ["size must be"]),
        ({"interpolation": "lanczos"}, ["interpolation must be one of nearest, bilinear, bicubic"]),
        ({"key": "pixel values"}, ["key must be a name"]),
        ({"randaugment": 1.5}, ["randaugment must be a whole number from 0 up, not 1.5"]),
        ({"randaugment": True}, ["randaugment must be"]),
        ({"randaugment_magnitude": 1}, ["randaugment_magnitude must be a whole number from 2 to 10, not 1"]),
        ({"randaugment_magnitude": 11}, ["randaugment_magnitude must be"]),
        ({"randaugment_p": -0.1}, ["randaugment_p must be a probability from 0 to 1"]),
        ({"cutout": 1.5}, ["cutout must be a share of the view's shorter side from 0 to 1, not 1.5"]),
        ({"randaugmant": 2}, ["Did you mean 'randaugment'?"]),
    ],
)
def test_a_bad_field_is_named(fields, words):
    with pytest.raises(ValueError, match=r"views\[1\]") as error:
        ViewGroup.from_dict(fields, (32, 32), "views[1]")
    for word in words:
        assert word in str(error.value)


def test_views_need_neither_torch_nor_transformers():
    code = (
        "import sys, hf_ssl.processing.views; print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
