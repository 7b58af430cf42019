"""The processor: shapes and groups, seeds, saving, overrides, odd inputs, and the native evaluation processor."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig

from hf_ssl.processing import SSLImageProcessor

COLOUR = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_p": 0.8, "grayscale_p": 0.2}


class MultiCropImageProcessor(SSLImageProcessor):
    """Two global groups that differ in blur and solarisation under one key, and small local views under another."""

    size = 48
    views = [
        {"key": "pixel_values", "count": 1, "scale": (0.4, 1.0), "hflip": 0.5, **COLOUR, "blur_p": 1.0},
        {"key": "pixel_values", "count": 1, "scale": (0.4, 1.0), "hflip": 0.5, **COLOUR, "solarize_p": 0.2},
        {"key": "local_pixel_values", "count": 4, "size": 20, "scale": (0.05, 0.4), "hflip": 0.5, **COLOUR},
    ]


class TwoViewImageProcessor(SSLImageProcessor):
    size = {"height": 32, "width": 32}
    views = [{"key": "pixel_values", "count": 2, "hflip": 0.5, **COLOUR, "blur_p": 0.5, "blur_kernel": 0.1}]


@pytest.fixture
def image() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC))


def test_groups_of_one_key_are_concatenated_in_order(image):
    processor = MultiCropImageProcessor()
    assert processor.num_views == 6
    assert processor.model_input_names == ["pixel_values", "local_pixel_values"]
    batch = processor([image, image[:40], image[:, :50]], seed=0)
    assert batch["pixel_values"].shape == (3, 2, 3, 48, 48)
    assert batch["local_pixel_values"].shape == (3, 4, 3, 20, 20)
    assert all(tensor.dtype == torch.float32 for tensor in batch.values())
    steps = [{"key": "a", "brightness": [b, b], "interpolation": "nearest"} for b in (0.0, 0.5, 1.0)]
    ordered = SSLImageProcessor(size=8, views=steps, image_mean=0.0, image_std=1.0)
    white = np.full((8, 8, 3), 200, np.uint8)
    means = ordered(white)["a"][0].mean(dim=(1, 2, 3)) * 255
    np.testing.assert_allclose(means, [0, 100, 200], atol=1e-4)


def test_draw_uses_one_picture_per_view_in_order(image):
    processor = MultiCropImageProcessor(brightness=0, contrast=0, hue=0, solarize_p=0)
    pictures = [np.full_like(image, level) for level in (10, 20, 30, 40, 50, 60)]
    views = processor.draw(pictures, np.random.default_rng(0))
    assert {key: (v.dtype, v.shape) for key, v in views.items()} == {
        "pixel_values": (np.uint8, (2, 48, 48, 3)), "local_pixel_values": (np.uint8, (4, 20, 20, 3))
    }  # fmt: skip
    np.testing.assert_array_equal(views["pixel_values"].mean(axis=(1, 2, 3)), [10, 20])
    np.testing.assert_array_equal(views["local_pixel_values"].mean(axis=(1, 2, 3)), [30, 40, 50, 60])
    again = processor.draw(pictures[::-1], np.random.default_rng(0), out=views)
    assert again is views
    np.testing.assert_array_equal(views["pixel_values"].mean(axis=(1, 2, 3)), [60, 50])
    with pytest.raises(ValueError, match="one picture per view, 6, and got 2"):
        processor.draw(pictures[:2], np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"shape \(height, width, 3\) and got uint8 \(60, 80, 1\)"):
        processor.draw([image[:, :, :1]] * 6, np.random.default_rng(0))


class Closed:
    """A picture that is not decoded yet: it remembers what was asked of it."""

    dtype = np.dtype(np.uint8)

    def __init__(self, pixels):
        self.pixels, self.shape, self.asked = pixels, pixels.shape, []

    def decode(self, shrink):
        self.asked.append(shrink)
        return self.pixels, 1


def test_a_closed_picture_is_decoded_once_for_all_its_views(image):
    processor = MultiCropImageProcessor()
    first, second = Closed(image), Closed(image[:50])
    views = processor.draw([first, first, second, second, first, second], np.random.default_rng(0))
    opened = [image, image, image[:50], image[:50], image, image[:50]]
    for key, expected in processor.draw(opened, np.random.default_rng(0)).items():
        np.testing.assert_array_equal(views[key], expected)
    assert len(first.asked) == len(second.asked) == 1
    big = Closed(np.zeros((480, 640, 3), np.uint8))
    TwoViewImageProcessor(scale=None, size=48).draw([big, big], np.random.default_rng(0))
    assert big.asked == [10]
    near = Closed(np.zeros((480, 640, 3), np.uint8))
    SSLImageProcessor(size=48, scale=None, interpolation="nearest").draw([near, near], np.random.default_rng(0))
    assert near.asked == [1]


def test_the_same_seed_gives_the_same_bytes(image):
    processor = TwoViewImageProcessor()
    before = image.copy()
    first, again, other = (processor([image, image], seed=s)["pixel_values"].numpy() for s in (7, 7, 8))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0, 0], first[0, 1])
    np.testing.assert_array_equal(processor(image, seed=7)["pixel_values"].numpy()[0], first[0])
    unseeded = [processor(image)["pixel_values"].numpy().tobytes() for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    np.testing.assert_array_equal(image, before)
    twin = pickle.loads(pickle.dumps(processor))
    assert twin(image, seed=7)["pixel_values"].numpy().tobytes() == first[:1].tobytes()


class WeakStrongImageProcessor(SSLImageProcessor):
    """FixMatch's three kinds of views: labelled weak, unlabelled weak, unlabelled strong."""

    size = 32
    views = [
        {"scale": None, "hflip": 0.5, "translate": 0.125},
        {"key": "weak", "scale": None, "hflip": 0.5, "translate": 0.125},
        {
            "key": "strong",
            "count": 2,
            "scale": None,
            "hflip": 0.5,
            "translate": 0.125,
            "randaugment": 2,
            "cutout": 0.5,
        },
    ]


def test_views_of_some_keys_depend_on_the_rng_and_the_keys_alone(image):
    processor = WeakStrongImageProcessor()
    assert (processor.num_views, processor.count_views()) == (4, 4)
    assert [processor.count_views(k) for k in (["pixel_values"], ["weak", "strong"], [], ["strong"])] == [1, 3, 0, 2]

    def draw(keys, of=processor):
        return of.draw([image] * of.count_views(keys), np.random.default_rng(3), keys)

    unlabeled = draw(["strong", "weak"])
    assert list(unlabeled) == ["weak", "strong"]
    assert [v.shape for v in unlabeled.values()] == [(1, 32, 32, 3), (2, 32, 32, 3)]
    again = draw(("weak", "strong"))
    alone = draw(None, WeakStrongImageProcessor(views=WeakStrongImageProcessor.views[1:]))
    for key, views in unlabeled.items():
        assert views.tobytes() == again[key].tobytes() == alone[key].tobytes()
    labeled = draw(["pixel_values"])
    assert list(labeled) == ["pixel_values"]
    np.testing.assert_array_equal(labeled["pixel_values"], unlabeled["weak"])  # each begins with the same numbers
    every = draw(None)
    assert list(every) == ["pixel_values", "weak", "strong"]
    np.testing.assert_array_equal(every["pixel_values"], labeled["pixel_values"])
    assert not np.array_equal(unlabeled["strong"][0], unlabeled["strong"][1])
    pictures = [np.full_like(image, level) for level in (10, 20, 30)]
    plain = WeakStrongImageProcessor(randaugment=0, cutout=0)
    views = plain.draw(pictures, np.random.default_rng(0), ["weak", "strong"])
    assert [v.mean() for v in (views["weak"][0], *views["strong"])] == [10, 20, 30]


def test_a_wrong_key_or_number_of_pictures_is_named(image):
    processor = WeakStrongImageProcessor()
    with pytest.raises(ValueError, match=r"no views 'stron'. Did you mean 'strong'\?"):
        processor.count_views(["stron"])
    with pytest.raises(ValueError, match="no views 'stron'"):
        processor.draw([image], np.random.default_rng(0), ["weak", "stron"])
    with pytest.raises(ValueError, match="one picture per view, 3, and got 4"):
        processor.draw([image] * 4, np.random.default_rng(0), ["weak", "strong"])
    assert processor.count_views("strong") == 2


def test_strong_views_are_saved_and_seeded(tmp_path, image):
    processor = WeakStrongImageProcessor(randaugment_magnitude=7, strong={"randaugment_p": 1.0})
    processor.save_pretrained(tmp_path)
    first = processor(image, seed=5)
    loaded = WeakStrongImageProcessor.from_pretrained(tmp_path)
    assert loaded.views[2]["randaugment_p"] == 1.0
    assert loaded(image, seed=5)["strong"].equal(first["strong"])
    assert not processor(image, seed=6)["strong"].equal(first["strong"])


def test_the_native_processor_is_the_eval_processor_unless_overridden():
    processor = WeakStrongImageProcessor()
    assert processor.native_processor().to_dict() == processor.eval_processor().to_dict()


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_any_channel_count(channels):
    image = np.random.default_rng(0).integers(0, 256, (50, 60, channels), dtype=np.uint8)
    strong = {"rotation": 5, "erase_p": 0.5, "solarize_p": 0.5, "randaugment": 6, "randaugment_p": 1.0, "cutout": 0.3}
    processor = MultiCropImageProcessor(num_channels=channels, **strong)
    batch = processor(image, seed=0)
    assert batch["pixel_values"].shape == (1, 2, channels, 48, 48)
    assert torch.isfinite(batch["local_pixel_values"]).all()
    if channels != 3:
        assert processor.image_mean == [pytest.approx(0.449)] * channels
        assert processor.image_std == [pytest.approx(0.226)] * channels
    chw = processor(image.transpose(2, 0, 1), seed=0)
    assert torch.equal(chw["pixel_values"], batch["pixel_values"])


def test_every_kind_of_picture(image):
    processor = TwoViewImageProcessor()
    expected = processor(image, seed=1)["pixel_values"]
    same = [Image.fromarray(image), image.transpose(2, 0, 1), torch.from_numpy(image.copy()), image / 255.0]
    same.append(torch.from_numpy(image.transpose(2, 0, 1).copy()))
    for picture in same:
        assert torch.equal(processor(picture, seed=1)["pixel_values"], expected)
    assert torch.equal(processor(np.stack([image, image]), seed=1)["pixel_values"][:1], expected)
    gray = image[:, :, 0]
    repeated = processor(np.repeat(gray[:, :, None], 3, axis=2), seed=1)["pixel_values"]
    for picture in (gray, gray[:, :, None], Image.fromarray(gray), torch.from_numpy(gray[None].copy())):
        assert torch.equal(processor(picture, seed=1)["pixel_values"], repeated)
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    assert torch.equal(processor(deep, seed=1)["pixel_values"], repeated)
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))  # the stored colours stay, as transformers' pipelines see them
    red = processor(Image.new("RGB", (40, 40), "red"), seed=1)["pixel_values"]
    assert torch.equal(processor(clear, seed=1)["pixel_values"], red)
    one = TwoViewImageProcessor(num_channels=1)
    assert one(image, seed=1)["pixel_values"].shape == (1, 2, 1, 32, 32)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (np.zeros((8, 8, 4), np.uint8), "takes 3 channels"),
        (np.zeros((8, 8, 3), np.int64), "must be uint8"),
        (np.full((8, 8, 3), 7.0), "float within 0 to 1"),
        (np.zeros(8, np.uint8), "two or three axes"),
        ([], "no picture"),
    ],
)
def test_a_picture_of_the_wrong_kind_is_refused_in_words(picture, words):
    with pytest.raises(ValueError, match=words):
        TwoViewImageProcessor()(picture)


def test_overrides_reach_the_groups():
    processor = MultiCropImageProcessor(size=64, brightness=0.1, local_pixel_values={"count": 2, "scale": (0.1, 0.2)})
    assert [group["brightness"] for group in processor.views] == [0.1] * 3
    assert processor.size == {"height": 64, "width": 64}
    image = np.zeros((50, 50, 3), np.uint8)
    batch = processor(image)
    assert batch["pixel_values"].shape[-1] == 64
    assert batch["local_pixel_values"].shape == (1, 2, 3, 20, 20)
    assert processor.views[2]["scale"] == [0.1, 0.2]
    assert MultiCropImageProcessor.views[0]["brightness"] == 0.4  # the class keeps its own
    assert TwoViewImageProcessor(count=4, image_mean=None).num_views == 4
    assert TwoViewImageProcessor(size=[16, 24])(image)["pixel_values"].shape[-2:] == (16, 24)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"scal": (0.1, 1)}, "has no argument 'scal'. Did you mean 'scale'?"),
        ({"num_chanels": 1}, "Did you mean 'num_channels'?"),
        ({"views": [{"flip": 0.5}]}, r"views\[0\] has an unknown field 'flip'. Did you mean 'hflip'?"),
        ({"views": []}, "views must be a list"),
        ({"count": 2}, "count differs between groups"),
        ({"hflip": 2}, "hflip must be a probability"),
        ({"image_mean": [0.5]}, "image_mean has 1 values for 3 channels"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std must be above 0"),
        ({"size": 0}, "size must be"),
        ({"eval_crop_pct": 0}, "eval_crop_pct"),
        ({"views_on": "gpu"}, "views_on must be 'host' or 'device', not 'gpu'"),
        ({"views": [{"size": 8}, {"size": 9}]}, r"has size \(8, 8\) before and \(9, 9\)"),
    ],
)
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        MultiCropImageProcessor(**kwargs)


def test_an_attribute_cannot_change_without_effect():
    with pytest.raises(AttributeError, match="size is fixed"):
        TwoViewImageProcessor().size = {"height": 8, "width": 8}


def test_saving_and_loading_is_exact(tmp_path, image):
    processor = MultiCropImageProcessor(
        num_channels=3, image_mean=[0.1, 0.2, 0.3], eval_crop_pct=0.9, hue=[-0.05, 0.1]
    )
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "MultiCropImageProcessor"
    assert saved["views"][2]["size"] == 20
    loaded = MultiCropImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded(image, seed=3)["local_pixel_values"].equal(processor(image, seed=3)["local_pixel_values"])
    changed = MultiCropImageProcessor.from_pretrained(tmp_path, num_channels=1, scale=(0.5, 1.0))
    assert changed.image_mean == [pytest.approx(0.449)]
    assert [group["scale"] for group in changed.views] == [[0.5, 1.0]] * 3
    with pytest.raises(ValueError, match="no argument 'sise'"):
        MultiCropImageProcessor.from_pretrained(tmp_path, sise=3)

    class MultiCropConfig(PreTrainedConfig):
        model_type = "hf_ssl_test_multi_crop"

    AutoImageProcessor.register(MultiCropConfig, MultiCropImageProcessor)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is MultiCropImageProcessor


def test_normalisation_by_hand():
    processor = TwoViewImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    pixels = torch.tensor([[[0, 128, 255], [51, 102, 204]]], dtype=torch.uint8)  # (1, 2, 3)
    values = processor.normalise(pixels.expand(4, 5, 1, 2, 3))
    expected = [[(0 - 0.485) / 0.229, (0.2 - 0.485) / 0.229], [(128 / 255 - 0.456) / 0.224, (0.4 - 0.456) / 0.224],
                [(1 - 0.406) / 0.225, (0.8 - 0.406) / 0.225]]  # fmt: skip
    assert values.shape == (4, 5, 3, 1, 2)
    assert values.movedim(-3, -1).is_contiguous()
    assert values.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    for view in values.flatten(0, 1):
        np.testing.assert_allclose(view[:, 0], expected, rtol=0, atol=1e-6)


def test_prepare_normalises_its_own_uint8_keys_and_nothing_else(image):
    processor = MultiCropImageProcessor()
    drawn = processor.draw([image] * 6, np.random.default_rng(0))
    batch = {key: torch.from_numpy(views[None]) for key, views in drawn.items()}
    labels, other = torch.tensor([3]), torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    floats = {"local_pixel_values": torch.rand(1, 4, 3, 20, 20)}
    ready = processor.prepare({**batch, **floats, "labels": labels, "mask": other})
    assert ready["labels"] is labels
    assert ready["mask"] is other
    assert ready["local_pixel_values"] is floats["local_pixel_values"]
    np.testing.assert_array_equal(processor.undo(ready["pixel_values"]), drawn["pixel_values"][None])
    assert batch["pixel_values"].dtype == torch.uint8  # the batch given is left alone


def test_undo_gives_the_picture_back(image):
    processor = TwoViewImageProcessor(size=[60, 80], views=[{"scale": None}])
    view = processor(image)["pixel_values"]
    np.testing.assert_array_equal(processor.undo(view), image[None, None])
    np.testing.assert_array_equal(processor.undo(view[0, 0].numpy()), image)


PLAIN = """
import sys
from pathlib import Path
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_ssl": raise ImportError("hf_ssl is not installed here")
sys.meta_path.insert(0, Absent())
import numpy as np
from transformers import AutoImageProcessor
for folder in map(Path, sys.argv[1:]):
    processor = AutoImageProcessor.from_pretrained(folder)
    values = processor(np.load(folder / "image.npy"), return_tensors="np", input_data_format="channels_last")
    np.save(folder / "values.npy", values["pixel_values"])
    print(type(processor).__name__)
"""


def test_the_eval_processor_loads_in_plain_transformers(tmp_path):
    folders, here = [], []
    for channels in (1, 3, 13):
        native = TwoViewImageProcessor(num_channels=channels).eval_processor()
        folders.append(tmp_path / str(channels))
        native.save_pretrained(folders[-1])
        image = np.random.default_rng(0).integers(0, 256, (60, 80, channels), dtype=np.uint8)
        np.save(folders[-1] / "image.npy", image)
        here.append(native(image, return_tensors="np", input_data_format="channels_last")["pixel_values"])
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PLAIN, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["BitImageProcessor"] * 3
    for channels, folder, expected in zip((1, 3, 13), folders, here, strict=True):
        assert expected.shape == (1, channels, 32, 32)
        np.testing.assert_array_equal(np.load(folder / "values.npy"), expected)


def test_the_eval_processor_resizes_and_normalises_by_hand():
    processor = TwoViewImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 0.2])
    native = processor.eval_processor()
    assert native.to_dict()["size"] == {"shortest_edge": 37}  # 32 / .875 = 36.57
    image = np.empty((74, 100, 3), np.uint8)
    image[:] = (51, 102, 153)
    values = native(image, return_tensors="np")["pixel_values"]
    assert values.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(values[0].mean(axis=(1, 2)), [0.2, 0.8, 1.5], atol=1e-5)
    gray = native(Image.new("L", (50, 40), 51), return_tensors="np")["pixel_values"]
    assert gray.shape == (1, 3, 32, 32)
    wide = TwoViewImageProcessor(size=[32, 64]).eval_processor()
    assert wide(np.full((50, 50, 3), 255, np.uint8), return_tensors="np")["pixel_values"].min() > 1.9
    single = TwoViewImageProcessor(num_channels=1).eval_processor()
    assert single(Image.new("L", (50, 40), 51), return_tensors="np")["pixel_values"].shape == (1, 1, 32, 32)
