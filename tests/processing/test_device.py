"""The device's half of a view: the host's pixels and torchvision's, one graph, no host sync, the same batches."""

import io
import itertools

import cv2
import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torchvision.transforms.v2 import functional as F

from hf_ssl.data import ImageSource, build_dataloader
from hf_ssl.methods.joint_embedding.dino import DINOImageProcessor
from hf_ssl.methods.joint_embedding.simclr import SimCLRImageProcessor
from hf_ssl.methods.masked.mae import MAEImageProcessor
from hf_ssl.methods.semi_supervised.fixmatch import FixMatchImageProcessor
from hf_ssl.processing import SSLImageProcessor, ViewGroup, device
from hf_ssl.processing.views import Draw, draw_view

RAW = ([0.0] * 3, [1.0] * 3)  # mean and std that leave pictures in 0..1
EVERYTHING = dict(
    hflip=0.5, rotation=10, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grayscale_p=0.2,
    blur_p=0.5, blur_kernel=0.1, solarize_p=0.3, erase_p=0.3, cutout=0.3, randaugment=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(photo) -> np.ndarray:
    return cv2.resize(photo, (112, 96), interpolation=cv2.INTER_AREA)


def group(**fields) -> ViewGroup:
    return ViewGroup.from_dict(fields, (96, 112))


def view(**choices) -> Draw:
    return Draw((0, 0, 96, 112), **choices)


def finished(image: np.ndarray, draw: Draw, recipe: ViewGroup, statistics=RAW) -> torch.Tensor:
    """(C, H, W) of one view; a second, different one beside it must not matter."""
    views = torch.from_numpy(np.stack([image, 255 - image]))
    width = device.columns([recipe])
    other = device.pack(view(jitter=(("hue", 0.3), ("contrast", 0.1))), recipe, width)
    return device.finish(views, torch.from_numpy(np.stack([device.pack(draw, recipe), other])), *statistics)[0]


def as_float(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255


ALONE = {
    **{
        f"{name} {f}": dict(jitter=((name, f),)) for name in ("brightness", "contrast", "saturation") for f in (0, 1.8)
    },
    **{f"hue {shift}": dict(jitter=(("hue", shift),)) for shift in (-0.5, -0.2, 0.0, 0.01, 0.33)},
    "gray": dict(gray=True),
    **{f"blur {sigma}": dict(sigma=sigma) for sigma in (0.1, 0.3, 1.2, 2.0)},
    "solarize": dict(solarize=True),
    "none": {},
}


def reference(image: np.ndarray, draw: Draw, recipe: ViewGroup) -> torch.Tensor:
    """The same draw by torchvision v2 in float."""
    x = as_float(image)
    for name, factor in draw.jitter:
        x = getattr(F, f"adjust_{name}")(x, factor)
    x = F.rgb_to_grayscale(x, num_output_channels=3) if draw.gray else x
    if draw.sigma >= 0.2:  # as on the host: below, the neighbours weigh less than one level
        side = min(int(np.ceil(3 * draw.sigma)), recipe.kernel_pixels // 2 or 99)
        x = F.gaussian_blur(x, [2 * side + 1] * 2, [draw.sigma] * 2)
    return F.solarize(x, 127.5 / 255) if draw.solarize else x  # what rounds to 128 or more


@pytest.mark.parametrize("choices", ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("kernel", [0.0, 0.05])
def test_one_operation_is_torchvisions(small, choices, kernel):
    recipe = group(brightness=0.8, blur_p=1.0, blur_kernel=kernel)
    theirs = reference(small, view(**choices), recipe)
    torch.testing.assert_close(
        finished(small, view(**choices), recipe), theirs, rtol=0, atol=3e-4
    )  # its luma is .2989


def test_jitter_in_every_order_with_all_the_rest_is_torchvisions(small):
    recipe, worst = group(brightness=0.8, blur_p=1.0), 0.0
    factors = (("brightness", 1.6), ("contrast", 0.4), ("saturation", 1.7), ("hue", 0.13))
    for i, jitter in enumerate(itertools.permutations(factors)):
        draw = view(jitter=jitter, sigma=0.9 * (i % 2), gray=i % 5 == 0, solarize=i % 3 == 0)
        worst = max(worst, float((finished(small, draw, recipe) - reference(small, draw, recipe)).abs().max()))
    assert worst <= 3e-4


def test_boxes_and_normalisation_by_hand():
    """Solarising inverts 200 to 55; Cutout's grey comes after it; what is erased is 0 after normalisation."""
    image = np.full((96, 112, 3), 200, np.uint8)
    image[0, 0] = 127
    recipe = group(erase_p=1.0, cutout=0.5)
    mean, std = [0.5, 0.25, 0.0], [0.5, 0.25, 1.0]
    out = finished(image, view(solarize=True, cutout=(2, 3, 4, 5), erase=(5, 7, 91, 105)), recipe, (mean, std))
    expected = torch.full((3, 96, 112), 55 / 255)
    expected[:, 0, 0] = 127 / 255
    expected[:, 2:6, 3:8] = 127 / 255
    expected = (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected[:, 5:96, 7:112] = 0
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 4), (40, 30)])
def test_blur_mirrors_at_the_border_of_any_picture(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    recipe = ViewGroup.from_dict({"blur_p": 1.0}, size)
    expected = cv2.GaussianBlur(image.astype(np.float32) / 255, (13, 13), 2.0, borderType=cv2.BORDER_REFLECT_101)
    out = finished(image, Draw((0, 0, *size), sigma=2.0), recipe)
    np.testing.assert_allclose(out.permute(1, 2, 0), expected, atol=1e-5)


def host_and_device(processor_class, image, rows=30, **fields) -> dict[str, torch.Tensor]:
    """{key: differences in levels of 255} over `rows` pictures with the same choices on both sides."""
    done = []
    for place in ("host", "device"):
        processor = processor_class(**fields, views_on=place)
        views = [processor.draw([image] * processor.num_views, np.random.default_rng(i)) for i in range(rows)]
        assert all(v.dtype == np.uint8 for one in views for k, v in one.items() if not k.endswith("_draws"))
        batch = processor.prepare({key: torch.from_numpy(np.stack([one[key] for one in views])) for key in views[0]})
        assert set(batch) == set(processor.model_input_names)
        done.append(batch)
    std = torch.tensor(processor.image_std)[:, None, None]
    assert all(views.movedim(-3, -1).is_contiguous() for batch in done for views in batch.values())
    return {key: ((done[0][key] - done[1][key]) * std).abs().double() * 255 for key in done[0]}


HOST = {  # the fields of one operation, and the 99th percentile in levels
    "brightness": (dict(brightness=0.8), 0.6), "contrast": (dict(contrast=0.8), 1.1),
    "saturation": (dict(saturation=0.8), 0.6), "hue": (dict(hue=0.5), 4), "gray": (dict(grayscale_p=1.0), 0.6),
    "blur": (dict(blur_p=1.0), 1.1), "narrow blur": (dict(blur_p=1.0, blur_kernel=0.05), 1.1),
    "solarize": (dict(solarize_p=1.0), 0.01), "erase": (dict(erase_p=1.0), 0.6), "cutout": (dict(cutout=0.5), 0.01),
    "nothing": (dict(hflip=0.5), 0.01),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "p99"), HOST.values(), ids=HOST)
def test_one_operation_is_the_hosts(photo, fields, p99):
    difference = host_and_device(SSLImageProcessor, photo, 6, size=96, **fields)["pixel_values"].flatten()
    assert difference.mean() <= 1, difference.mean()
    assert difference[:: len(difference) // 100_000 + 1].quantile(0.99) <= p99


@pytest.mark.parametrize(
    ("processor_class", "fields", "p99"),
    [(SimCLRImageProcessor, {}, 4), (DINOImageProcessor, {}, 4), (FixMatchImageProcessor, {}, 0.01),
     (MAEImageProcessor, {}, 0.01), (SSLImageProcessor, EVERYTHING, 4)],
)  # fmt: skip
def test_whole_views_are_the_hosts(photo, processor_class, fields, p99):
    for key, difference in host_and_device(processor_class, photo, 12, size=96, **fields).items():
        assert difference.mean() <= 1, (key, difference.mean())
        flat = difference.flatten()
        assert flat[:: len(flat) // 100_000 + 1].quantile(0.99) <= p99, key


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channel_counts_leave_out_what_needs_rgb(channels):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    fields = {**EVERYTHING, "randaugment": 0, "grayscale_p": 0.5}
    difference = host_and_device(SSLImageProcessor, image, 12, size=32, num_channels=channels, **fields)
    assert difference["pixel_values"].mean() <= 0.6
    assert difference["pixel_values"].max() <= 3


def test_groups_of_one_key_share_their_columns(photo):
    """Kernels of unlike width side by side: the narrow one's row is filled up with zeros."""
    views = [dict(blur_p=1.0, blur_sigma=[0.1, 1.0]), dict(blur_p=1.0, blur_sigma=[2.0, 3.0], brightness=0.4)]
    assert host_and_device(SSLImageProcessor, photo, 4, size=64, views=views)["pixel_values"].mean() <= 1
    assert device.columns([group(**fields) for fields in views]) == 30 + 9
    assert device.columns([group(hflip=0.5, rotation=3, randaugment=2)]) == 0
    plain = MAEImageProcessor(size=32, views_on="device")
    assert set(plain.draw([photo], np.random.default_rng(0))) == {"pixel_values"}  # nothing to finish, nothing sent


def random_batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    recipe = ViewGroup.from_dict({**EVERYTHING, "randaugment": 0}, (24, 20))
    rng = np.random.default_rng(3)
    rows = [device.pack(draw_view(recipe, 24, 20, rng), recipe) for _ in range(count)]
    views = rng.integers(0, 256, (count, 24, 20, 3), dtype=np.uint8)
    return torch.from_numpy(views), torch.from_numpy(np.stack(rows))


def test_one_graph_and_no_host_sync():
    """fullgraph raises at a break; a meta tensor has no values, so whatever needs one on the host raises."""
    views, params = random_batch(16)
    eager = device.finish(views, params, *RAW)
    torch._dynamo.reset()
    compiled = torch.compile(device.finish, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(views, params, *RAW), eager, rtol=0, atol=1e-5)
    for jitter in (True, False):
        meta = device.finish(views.to("meta"), params.to("meta"), *RAW, jitter=jitter)
        assert (meta.shape, meta.dtype, meta.stride()) == (eager.shape, eager.dtype, eager.stride())
    assert eager.is_contiguous(memory_format=torch.channels_last)


def test_where_nothing_compiles_the_views_are_finished_all_the_same(monkeypatch, caplog):
    from torch._dynamo.exc import TorchDynamoException

    def no_compiler(*_):
        raise TorchDynamoException("no C compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **_: no_compiler)
    device._compiled.cache_clear()
    views, params = random_batch(2)
    run = device._compiled()
    for _ in range(2):
        torch.testing.assert_close(run(views, params, *RAW, True), device.finish(views, params, *RAW))
    assert caplog.text.count("cannot be compiled") == 1
    device._compiled.cache_clear()


def test_a_view_is_finished_alike_in_any_batch():
    views, params = random_batch(8)
    whole = device.finish(views, params, *RAW)
    for i in range(8):
        torch.testing.assert_close(
            device.finish(views[i : i + 1], params[i : i + 1], *RAW)[0], whole[i], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_the_loader_are_the_hosts(photo, workers):
    contents = []
    for i in range(8):
        out = io.BytesIO()
        Image.fromarray(photo[10 * i : 200 + 10 * i, :250]).save(out, "PNG")
        contents.append({"bytes": out.getvalue(), "path": f"{i}.png"})
    rows = Dataset.from_dict({"image": contents}, features=Features(image=ImageFeature(decode=False)))
    source = ImageSource("pictures", rows)
    for processor_class in (SimCLRImageProcessor, DINOImageProcessor):
        done = []
        for place in ("host", "device"):
            processor = processor_class(size=64, views_on=place)
            loader = build_dataloader(source, processor, 4, seed=5, num_workers=workers, shuffle_buffer=8)
            done.append([processor.prepare(batch) for batch in loader])
            loader.close()
        assert len(done[0]) == 2
        for mine, other in zip(*done, strict=True):
            for key in processor.model_input_names:
                assert mine[key].dtype == torch.float32 and mine[key].shape == other[key].shape
                assert (mine[key] - other[key]).abs().mean() * 0.225 * 255 <= 1
