"""From file to feature: training, `hf-ssl embed` and the pipelines of transformers see the same pixels of a file."""

import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, pipeline
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

import hf_ssl
from hf_ssl.cli import main
from hf_ssl.data.collator import ViewCollator
from hf_ssl.data.decode import decode_image
from hf_ssl.data.sources import load_source
from hf_ssl.evaluation import predict
from hf_ssl.evaluation.album import Run, load_album
from hf_ssl.hub import export
from hf_ssl.methods import METHODS
from hf_ssl.methods.semi_supervised.fixmatch import FixMatchForPreTraining
from tests.contract.tiny import RESNET, VIT, build, processor


def sprite(height: int = 26, width: int = 22) -> np.ndarray:
    """RGBA with colours of its own under the transparent and the half transparent pixels."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (5, 4, 4), dtype=np.uint8)
    rgba = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).copy()
    rgba[:, : width // 3, 3], rgba[: height // 3, :, 3] = 0, 255
    return rgba


def files(height: int = 26, width: int = 22) -> dict[str, bytes]:
    """One file of every kind of 8 bits that Pillow writes, and of more where it reads them as 8."""
    rgba = Image.fromarray(sprite(height, width))
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    palette = rgb.quantize(16)
    both = Image.merge("LA", [grey, rgba.getchannel("A")])
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = cv2.imencode(".png", np.random.default_rng(1).integers(0, 65536, (height, width, 3)).astype(np.uint16))[1]
    some = bytes(range(0, 256, 16))  # of each colour of the palette
    made: dict[str, tuple[Image.Image, dict]] = {
        "rgb.png": (rgb, {}), "rgb.jpg": (rgb, {}), "rgb.bmp": (rgb, {}), "rgb.tif": (rgb, {}), "rgb.webp": (rgb, {}),
        "progressive.jpg": (rgb, {"progressive": True, "subsampling": 0}),
        "grey.png": (grey, {}), "grey.jpg": (grey, {}), "grey.pgm": (grey, {}), "bits.png": (grey.convert("1"), {}),
        "sprite.png": (rgba, {}), "sprite.webp": (rgba, {"lossless": True, "exact": True}), "sprite.tif": (rgba, {}),
        "grey_alpha.png": (both, {}), "one_clear_colour.png": (rgb, {"transparency": rgb.getpixel((3, 3))}),
        "one_clear_grey.png": (grey, {"transparency": grey.getpixel((3, 3))}),
        "palette.png": (palette, {}), "palette_clear.png": (palette, {"transparency": palette.getpixel((3, 3))}),
        "palette_alpha.png": (palette, {"transparency": some}), "palette.gif": (palette, {}),
        "clear.gif": (palette, {"transparency": palette.getpixel((3, 3))}),
        "animated.gif": (rgb, {"save_all": True, "append_images": [rgb.rotate(180)], "duration": 50}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}), "cmyk.tif": (rgb.convert("CMYK"), {}),
        "turned.jpg": (rgb, {"exif": turned}), "turned_sprite.png": (rgba, {"exif": turned}),
        "turned_grey.jpg": (grey, {"exif": turned}), "ycbcr.tif": (rgb.convert("YCbCr"), {}),
    }  # fmt: skip
    found = {"deep_rgb.png": deep.tobytes()}
    for name, (image, options) in made.items():
        buffer = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(name[-3:], name.rpartition(".")[2].upper())
        image.save(buffer, kind, **options)
        found[name] = buffer.getvalue()
    return found


FILES = files()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for name, data in FILES.items():
        (root / name).write_bytes(data)
    return root


class _AsItIs:
    """A processor whose only view is the picture."""

    def count_views(self, keys=None) -> int:
        return 1

    def draw(self, images, rng, keys=None, out=None):
        image = images[0]
        return {"pixel_values": image.decode()[0] if hasattr(image, "decode") else image}


@pytest.mark.parametrize("name", FILES)
def test_training_and_evaluation_see_what_a_pipeline_opens(name: str, folder: Path) -> None:
    opened = load_image(str(folder / name))
    expected = convert_to_rgb(opened, return_numpy=True)  # by the native processor that gets the opened file
    grey = np.asarray(opened.convert("L"))
    for value in (FILES[name], str(folder / name), {"bytes": FILES[name], "path": None}, Image.open(folder / name)):
        np.testing.assert_array_equal(decode_image(value), expected)
        np.testing.assert_array_equal(decode_image(value, 1)[..., 0], grey)
    for channels, wanted in ((3, expected), (1, grey)):
        source = load_source(str(folder), channels=channels)
        index = [Path(image["path"]).name for image in source.dataset["image"]].index(name)
        row = {**source.dataset[index], "_epoch": 0, "_index": index}
        trained = ViewCollator(source, _AsItIs(), 0)([row])["pixel_values"][0].numpy()
        np.testing.assert_array_equal(trained.squeeze(), wanted)
        np.testing.assert_array_equal(source.image(row, index).squeeze(), wanted)
    views = processor("simclr")
    given = (Image.open(folder / name), expected)  # a file that nobody turned upright, and the picture
    one, two = (views(image, seed=0)["pixel_values"] for image in given)
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_exported_processor_gives_training_pictures_of_every_file(
    name: str, folder: Path, tmp_path: Path
) -> None:
    ours = processor(name)
    ours.native_processor().save_pretrained(tmp_path)
    loaded = (AutoProcessor if hasattr(ours, "encode_text") else AutoImageProcessor).from_pretrained(tmp_path)
    plain = getattr(loaded, "image_processor", loaded)
    mine = ours.eval_processor()([decode_image(data) for data in FILES.values()], return_tensors="pt")
    theirs = plain([load_image(str(folder / file)) for file in FILES], return_tensors="pt")
    assert torch.equal(theirs["pixel_values"], mine["pixel_values"])


@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_embed_and_the_pipeline_give_the_same_features_of_every_file(backbone, folder: Path, tmp_path: Path) -> None:
    export(build("simclr", backbone), processor("simclr"), tmp_path / "model")
    extract = pipeline("image-feature-extraction", model=str(tmp_path / "model"))
    command = ["embed", str(tmp_path / "model"), "--dataset", str(folder), "--output", str(tmp_path / "found.npz")]
    assert main([*command, "--device", "cpu"]) == 0
    found = np.load(tmp_path / "found.npz")
    assert len(found["path"]) == len(FILES) and found["embedding"].std(0).max() > 1e-3
    for path, feature in zip(found["path"], found["embedding"]):
        outputs = np.asarray(extract(str(folder / str(path))))[0]
        plain = outputs[0] if backbone is VIT else outputs.mean((1, 2))  # class token; a ResNet's map, pooled
        np.testing.assert_allclose(plain, feature, rtol=0, atol=1e-5, err_msg=str(path))


def test_fit_and_the_report_see_what_the_pipeline_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one call to the published folder: what trains, what is predicted, what the report compares."""
    paths = [tmp_path / "pictures" / "ab"[i % 2] / name for i, name in enumerate(files(16, 16))]
    for path, data in zip(paths, files(16, 16).values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    trained: list[torch.Tensor] = []
    losses = FixMatchForPreTraining.losses

    def record(self, pixel_values, labels=None, **views):
        trained.extend([*pixel_values.flatten(0, 1), *views["weak_pixel_values"].flatten(0, 1)])
        return losses(self, pixel_values, labels, **views)

    monkeypatch.setattr(FixMatchForPreTraining, "losses", record)
    still = {"scale": None, "hflip": 0.0, "translate": 0.0}
    report = hf_ssl.fit(
        "resnet-pico", str(tmp_path / "pictures"), views={"pixel_values": still, "weak_pixel_values": still},
        image_size=16, num_train_epochs=1, per_device_train_batch_size=4, unlabeled_ratio=1, use_cpu=True,
        disable_tqdm=True, precision="fp32", report_to=[],
    )  # fmt: skip
    report.save(tmp_path / "saved")
    classify = pipeline("image-classification", model=str(tmp_path / "saved"), function_to_apply="softmax")
    opened = [next(iter(classify.preprocess(str(path))["pixel_values"])) for path in paths]
    assert len(trained) >= len(paths)
    assert all(min(float((image - one).abs().max()) for one in opened) < 1e-5 for image in trained)
    found = predict(report.model, str(tmp_path / "pictures"), report.processor, progress=False, device="cpu")
    order = [paths.index(Path(row["image"]["path"])) for row in load_source(str(tmp_path / "pictures")).dataset]
    for place, probabilities in zip(order, found.probabilities, strict=True):
        said = {one["label"]: one["score"] for one in classify(str(paths[place]))}
        np.testing.assert_allclose([said[name] for name in "ab"], probabilities, atol=1e-5, err_msg=paths[place].name)
    album = load_album(Run.open(tmp_path / "saved"), str(tmp_path / "pictures"), progress=False)
    with torch.no_grad():
        plain = AutoModel.from_pretrained(tmp_path / "saved")(torch.stack(opened)).pooler_output.flatten(1)
    torch.testing.assert_close(album.after, F.normalize(plain, dim=1)[order], rtol=0, atol=1e-5)


def test_a_model_of_grey_pictures_refuses_the_pipeline_and_gives_its_features_of_grey_ones(
    folder: Path, tmp_path: Path
) -> None:
    """Pipelines hand over RGB only: never another picture without a word."""
    model, views = build("simclr", {**VIT, "num_channels": 1}), processor("simclr", num_channels=1)
    export(model, views, tmp_path)
    with pytest.raises(ValueError, match="channel"):
        pipeline("image-feature-extraction", model=str(tmp_path))(str(folder / "sprite.png"))
    features: dict[str, np.ndarray] = {}
    reader, native = AutoImageProcessor.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for name, data in FILES.items():
            pixels = reader(load_image(str(folder / name)).convert("L"), return_tensors="pt")["pixel_values"]
            plain = native(pixels).last_hidden_state[:, 0]
            mine = views.eval_processor()(
                decode_image(data, 1), return_tensors="pt", input_data_format="channels_last"
            )
            torch.testing.assert_close(plain, model.eval().features(mine["pixel_values"]), rtol=0, atol=1e-6, msg=name)
            features[name] = plain[0].numpy()
    command = ["embed", str(tmp_path), "--dataset", str(folder), "--output", str(tmp_path / "found.npz")]
    assert main([*command, "--device", "cpu"]) == 0
    found = np.load(tmp_path / "found.npz")
    for path, feature in zip(found["path"], found["embedding"]):
        np.testing.assert_allclose(features[Path(path).name], feature, rtol=0, atol=1e-5, err_msg=path)


def test_sixteen_bits_are_scaled_where_a_pipeline_cuts_them_off(tmp_path: Path) -> None:
    """The one kind that plain transformers cannot show: the card says so."""
    deep = np.array([[0, 257, 25700, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.asarray(load_image(str(tmp_path / "deep.png")))[0, :, 0].tolist() == [0, 255, 255, 255]
    assert decode_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 100, 255]
    export(build("simclr", VIT), processor("simclr"), tmp_path / "model")
    assert "divided by 257" in (tmp_path / "model" / "README.md").read_text()


def test_one_place_decides_what_a_file_looks_like() -> None:
    """No other module opens image files or changes their mode: whatever reads a picture sees the one above."""
    root = Path(hf_ssl.__file__).parent
    change = re.compile(
        r"\w\.convert\((mode|\"[A-Z]+\")|alpha_composite|Image\.open\(|cv2\.im(read|dec)|decode_jpeg\("
    )
    found = {str(file.relative_to(root)) for file in root.rglob("*.py") if change.search(file.read_text())}
    assert found - {"hub/card.py"} == {"pixels.py", "data/decode.py"}  # a card writes code for others
