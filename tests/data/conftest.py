"""Small datasets on disk, of pictures whose red value says which one it is."""

import io
import tarfile
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image


def png(value, size=4):
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value % 256, value // 256, 0)).save(out, "PNG")
    return out.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_parquet(path, values, column="image", **extra):
    """Row groups of 4 rows; the image's stored path is "<value>.png"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {column: [{"bytes": png(v), "path": f"{v}.png"} for v in values], **extra}
    features = datasets.Features({column: datasets.Image(), **{name: datasets.Value("int64") for name in extra}})
    datasets.Dataset.from_dict(data, features=features).to_parquet(str(path), batch_size=4)
    return str(path)


def write_tar(path, values):
    with tarfile.open(path, "w") as tar:
        for v in values:
            for name, data in ((f"{v:04d}.png", png(v)), (f"{v:04d}.cls", str(v % 3).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="session")
def make():
    return SimpleNamespace(png=png, write=write, write_parquet=write_parquet, write_tar=write_tar)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What `datasets` prepares goes to a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
