"""WebDataset archives on this machine: .tar files, plain or compressed, whose members share a name and are one row.

`datasets` reads them too, but takes an archive that was cut between two members for a whole one, tells fields apart by
case (JPG is not jpg), and gives up where a sample lacks what the first ones hold. Here an archive that does not end
with its end mark is an error, and a sample without an image is a row without an image, which is counted.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from hf_ssl.data.files import check_regular, open_regular, printable
from hf_ssl.data.shards import CHUNK, DatasetShards, SourceError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PROBED = 5  # samples of an archive that are read to learn the columns
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7z")
_BLOCK = 512


class TarShards(DatasetShards):
    """One shard per archive, read without `datasets`; `features` are its columns, images under their own name."""

    def __init__(self, dataset: Any, files: Sequence[str], features: Any):
        super().__init__(dataset)
        self.files, self.features, self.image_column = list(files), features, "image"
        self.count = len(self.files)

    def use(self, image_column: str) -> None:
        """Hand out this column as `image`."""
        self.image_column = image_column

    def tables(self, shard: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        names = {name: name for name in self.features if name != "image"}
        names["image"] = self.image_column
        names.pop(self.image_column if self.image_column != "image" else "", None)
        if columns is not None:
            names = {name: names[name] for name in columns}
        schema = pa.schema([self.features.arrow_schema.field(field) for field in names.values()])
        rows = _rows([self.files[shard]], tuple(names.values()))
        while chunk := list(islice(rows, CHUNK)):
            yield _table(chunk, schema, self.files[shard]).rename_columns(list(names))


def _table(rows: list[dict], schema: pa.Schema | None, file: str) -> pa.Table:
    from datasets.features.features import cast_to_python_objects

    try:
        return pa.Table.from_pylist(rows, schema)
    except pa.ArrowException:  # arrays of several dimensions, which Arrow takes as lists
        try:
            return pa.Table.from_pylist(cast_to_python_objects(rows, only_1d_for_numpy=True), schema)
        except (pa.ArrowException, TypeError) as error:
            raise SourceError(
                f"{printable(file)}: a field holds another kind of value than in the first samples: {error}."
            ) from error


def open_tars(files: list[str], streaming: bool) -> tuple[Any, Any]:
    """(map-style or streamed dataset, its features) of the archives. SourceError names the one that is not whole."""
    import datasets

    for file in files:
        _check_end(file)
    features = _features(files)
    options: dict[str, Any] = {"features": features, "gen_kwargs": {"files": files, "fields": tuple(features)}}
    if streaming:
        return datasets.IterableDataset.from_generator(_rows, **options), features
    # what is prepared once is found again by these arguments: a file that has changed is another one
    options["gen_kwargs"]["stamps"] = tuple((os.path.getsize(file), os.path.getmtime(file)) for file in files)
    return datasets.Dataset.from_generator(_rows, **options), features


def _features(files: list[str]) -> Any:
    """The columns of the first samples, images as such."""
    import datasets

    found: list[dict] = []
    for file in files:
        found += islice(_samples(file), _PROBED)
        if any(_images(sample) for sample in found):
            break
    if not found:
        raise SourceError(
            f"{', '.join(map(printable, files[:3]))}: there is no sample in them (a.jpg, a.cls, b.jpg, ...)."
        )
    names = dict.fromkeys(name for sample in found for name in sample if name not in ("__key__", "__url__"))
    bare = [name for name in names if name in _extensions()]
    if len(bare) > 1 and not any(len(_images(sample)) > 1 for sample in found):
        for name in bare[1:]:  # photographs as .jpg, drawings as .png: one column
            del names[name]
    rows = [{name: _value(sample, name) for name in (*names, "__key__", "__url__")} for sample in found]
    features = datasets.Features.from_arrow_schema(_table(rows, None, files[0]).schema)
    for name in names:
        if _extension(name) in _extensions():
            features[name] = datasets.Image()
    return features


def _rows(files: list[str], fields: tuple[str, ...], stamps: Any = None) -> Iterator[dict]:
    """Each sample of the archives with all of `fields`; images as {"bytes", "path"}, None where there is none."""
    for file in files:
        for sample in _samples(file):
            yield {name: _value(sample, name) for name in fields}


def _value(sample: dict, name: str) -> Any:
    if name not in _extensions():
        value = sample.get(name)
        stored = _extension(name) in _extensions() and value is not None
        return {"bytes": value, "path": f"{sample['__key__']}.{name}"} if stored else value
    images = _images(sample)
    kind = name if name in images else images[0] if len(images) == 1 else None
    if kind is None or sample[kind] is None:
        return None
    return {"bytes": sample[kind], "path": f"{sample['__key__']}.{kind}"}


def _images(sample: dict) -> list[str]:
    return [name for name in sample if name in _extensions()]


def _extension(name: str) -> str:
    return name.rpartition(".")[2]


def _extensions() -> frozenset[str]:
    return _webdataset()[0]


def _decoders() -> dict[str, Any]:
    return _webdataset()[1]


def _webdataset() -> tuple[frozenset[str], dict[str, Any]]:
    """The extensions of images, and what makes values of others, as `datasets` has them."""
    if not _KNOWN:
        from datasets.packaged_modules.webdataset.webdataset import WebDataset

        _KNOWN.append((frozenset(WebDataset.IMAGE_EXTENSIONS), WebDataset.DECODERS))
    return _KNOWN[0]


_KNOWN: list[tuple[frozenset[str], dict[str, Any]]] = []


def _samples(file: str) -> Iterator[dict]:
    """{"__key__", "__url__", field: value}: members in a row that share all up to the first dot of their name."""
    shown = printable(file)
    sample: dict[str, Any] = {}
    for name, content in _members(file):
        match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name, re.DOTALL)
        if match is None or not match[2]:
            continue
        key, field = match[1], match[2].lower()
        if sample and sample["__key__"] != key:
            yield sample
            sample = {}
        if field in sample:
            raise SourceError(f"{shown} holds {key}.{field} twice in a row; two samples need two names.")
        sample |= {"__key__": key, "__url__": shown, field: _decoded(shown, name, field, content)}
    if sample:
        yield sample


def _decoded(shown: str, name: str, field: str, content: bytes | None) -> Any:
    decode = _decoders().get(_extension(field))
    if decode is None or content is None:
        return content
    try:
        return decode(content)
    except Exception as error:  # int, json, numpy ... each has its own
        raise SourceError(f"{shown}: the member {name} cannot be read: {type(error).__name__}: {error}.") from error


def _members(file: str) -> Iterator[tuple[str, bytes | None]]:
    """(printable name, content) of the visible files, up to the end mark; the content of a link is None.

    SourceError: the archive is not whole.
    """
    seen = 0
    try:
        with _opened(file) as tar:
            while (member := tar.next()) is not None:
                seen += 1
                tar.members.clear()  # TarFile remembers all of them
                name = printable(member.name)
                if member.isdir() or os.path.basename(name).startswith((".", "__")):
                    continue
                found = tar.extractfile(member) if member.isreg() else None
                yield name, None if found is None else found.read()
            _check_rest(tar)
    except (tarfile.TarError, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise SourceError(
            f"{printable(file)} is not a whole .tar file: after its first {seen} member(s), {error}. It was cut off "
            "or damaged: copy it again, or take it out of the data set."
        ) from error


def _opened(file: str) -> tarfile.TarFile:
    check_regular(file)
    with open_regular(file) as start:
        compressed = start.read(6).startswith(_COMPRESSED)
    return tarfile.open(file, "r|*" if compressed else "r:", tarinfo=_Member, encoding="utf-8")


class _Member(tarfile.TarInfo):
    """A header; TarFile ends quietly at one that is cut off, damaged or missing, and here that is an error."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            what = "the file ends" if "empty" in str(error) or "truncated" in str(error) else "there is no header"
            raise tarfile.ReadError(f"{what} where another member or the end mark should stand") from error


def _check_rest(tar: tarfile.TarFile) -> None:
    """Nothing but zeros behind the end mark: archives that were joined hold more, which would not be read."""
    stream: Any = tar.fileobj
    while block := stream.read(1 << 16):
        if block.strip(b"\0"):
            raise tarfile.ReadError("the end mark comes before the end of the file (were several archives joined?)")


def _check_end(file: str) -> None:
    """SourceError where a plain archive lacks its end mark, without reading what it holds."""
    with open_regular(file) as found:
        compressed = found.read(6).startswith(_COMPRESSED)
        size = found.seek(0, os.SEEK_END)
        found.seek(max(0, size - _BLOCK))
        ended = found.read() == bytes(_BLOCK)
    if not compressed and not ended:
        for _ in _members(file):
            pass
