"""One name to one dataset of undecoded images: built-in sets, folders, parquet, webdataset, the Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_ssl.data import given, local, remote
from hf_ssl.data.captions import Captions, FileCaptions, find_captions
from hf_ssl.data.decode import BadImageError, decode_image
from hf_ssl.data.files import Home, OutsideError, local_path, printable, resolved
from hf_ssl.data.shards import DatasetShards, ParquetShards, SourceError
from hf_ssl.data.tars import TarShards, open_tars
from hf_ssl.spelling import nearest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILT_IN = ("emoji", "emoji:placed", "fashion-mnist")
ACCEPTED = (
    f"one of {', '.join(BUILT_IN)}; a folder or glob of images; a .parquet or .tar (webdataset) file, glob or folder; "
    "a Hub dataset owner/name or owner/name:config; a dataset of the `datasets` library; or a list or torch dataset "
    "of images, (image, label) pairs or rows with an image"
)
_LABEL_NAMES = ("label", "labels", "cls", "class")


@dataclass(frozen=True, eq=False)
class Part:
    """Which rows of a dataset a source holds, and for what; see `data.splits`.

    role: train, validation or test. of: the dataset, its split and its rows, the same for all parts of one whole.
    numbers: (rows,) ascending, the number of each row in the whole; None: all rows, in order.
    """

    role: str
    of: tuple[Any, ...]
    numbers: np.ndarray | None = None


@dataclass
class ImageSource:
    """A dataset whose rows hold one undecoded image under `image`, and how to decode it.

    `dataset` is map-style or streamed, its other columns as they were; `labels` are its label-like ones. `render`, if
    set, makes the picture from the decoded one: at training once per view, at evaluation once, seeded by the row.
    """

    name: str
    dataset: Dataset | IterableDataset
    split: str = "train"
    labels: tuple[str, ...] = ()
    channels: int = 3
    keep_alpha: bool = False
    render: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None
    random_render: bool = True  # False: `render` draws nothing, so one picture serves all views
    dtype: str | None = None  # of an array column: its rows are nested lists, which have none
    shards: Any = field(default=None, repr=False)  # reader of a streamed source
    caption_column: str | None = None
    texts: Captions | None = None  # how captions are read; by default as they stand in `caption_column`
    part: Part | None = field(default=None, repr=False)  # the whole that these rows belong to, where known
    missing: tuple[str, ...] = field(default=(), repr=False)  # "where: reason" of images promised and not there
    home: Home | None = None  # where its rows' files may lie; None: on this machine, or on the Hub
    said: set[str] = field(default_factory=set, repr=False, compare=False)  # broken images that were logged
    outside: bool = False  # whether rows may name other files, and addresses on the web

    def __post_init__(self) -> None:
        if self.texts is None and self.caption_column is not None:
            self.texts = Captions(self.caption_column)
        if self.is_stream and self.shards is None:
            self.shards = DatasetShards(self.dataset)

    @property
    def is_stream(self) -> bool:
        """True where rows come shard by shard, False where any row can be asked for."""
        return not hasattr(self.dataset, "num_rows")

    @property
    def num_rows(self) -> int | None:
        """How many rows there are; None for a stream that does not say."""
        if not self.is_stream:
            return len(self.dataset)
        if self.shards.lengths is not None:
            return sum(self.shards.lengths)
        known = (self.dataset.info.splits or {}).get(self.split)
        return known.num_examples or None if known is not None else None

    def __len__(self) -> int:
        if (rows := self.num_rows) is None:
            raise TypeError(f"{self.name} (split {self.split}) is a stream that does not say how many images it has.")
        return rows

    def decode(self, row: dict) -> np.ndarray:
        """The row's picture, (H, W, channels) uint8, or (H, W, 4) with `keep_alpha`; else BadImageError."""
        value = self.content(row)
        if isinstance(value, list):
            value = np.asarray(value, dtype=self.dtype)
        return decode_image(value, self.channels, self.where(row), self.keep_alpha)

    def content(self, row: dict) -> Any:
        """What the row holds as its image, a path as one that may be opened. BadImageError: it may not."""
        value = row["image"]
        path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else value
        return self._allowed(path, row) if isinstance(path, str) else value

    def _allowed(self, path: str, row: dict) -> str:
        try:
            return resolved(path, self.home, self.outside)
        except OutsideError as error:
            raise BadImageError(self.where(row), str(error)) from error

    def image(self, row: dict, index: int) -> np.ndarray:
        """The evaluation picture (H, W, channels): decoded and rendered, seeded by the row's number."""
        picture = self.decode(row)
        return picture if self.render is None else self.render(picture, np.random.default_rng(index))

    def with_channels(self, channels: int) -> ImageSource:
        """The same with files decoded to `channels`, where that is 1, 3 or 4; arrays and rendered drawings stay."""
        of_files = self.dtype is None and self.render is None
        return replace(self, channels=channels) if of_files and channels in (1, 3, 4) else self

    @property
    def has_captions(self) -> bool:
        return self.texts is not None

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The columns that `caption` needs beside `image`."""
        return () if self.texts is None else self.texts.columns

    def require_captions(self) -> Captions:
        """How captions are read, or a SourceError that says what to do."""
        if self.texts is None:
            columns = ", ".join(self.dataset.column_names or ("unknown",))
            raise SourceError(
                f"{self.name} (split {self.split}) has no captions; its columns are {columns}. Name the one that "
                "holds the texts with --caption_column (caption_column=...)."
            )
        return self.texts

    def captions(self, row: dict) -> list[str]:
        """All texts of a row, the canonical one first. BadImageError: it has none; SourceError: no row has any."""
        how = self.require_captions()
        if not (texts := how.texts(self._located(row, how))):
            raise BadImageError(self.where(row), f"the row has no caption ({how.name} is empty)")
        return texts

    def caption(self, row: dict, rng: np.random.Generator) -> str:
        """One text of the row for training, drawn by `rng`; errors as `captions`."""
        self.captions(row)
        how = self.require_captions()
        return how.draw(self._located(row, how), rng)

    def _located(self, row: dict, how: Captions) -> dict:
        """The row, with a path to the file of its texts that may be opened."""
        if not isinstance(how, FileCaptions) or not row.get(how.column):
            return row
        return {**row, how.column: self._allowed(row[how.column], row)}

    def number(self, index: int | None) -> int | None:
        """The number in the whole dataset of the row at position `index` of this source."""
        if index is None or self.part is None or self.part.numbers is None:
            return index
        return int(self.part.numbers[index])

    def where(self, row: dict) -> str:
        """What a message calls this row: its file if it is one, else its number and the name stored with it."""
        value, index = row["image"], row["_row"] if "_row" in row else self.number(row.get("_index"))
        path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
        path = path and printable(local_path(path))
        if path and (not isinstance(value, dict) or value.get("bytes") is None):
            return path
        place = self.name
        if index is not None:
            place = self.shards.locate(index, self.name) if self.shards else f"row {index} of {self.name}"
        return f"{path} ({place})" if path else place


def load_source(
    spec: Any,
    split: str = "train",
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    channels: int | None = None,
    caption_column: str | None = None,
    allow_outside_files: bool = False,
) -> ImageSource:
    """Find the images that `spec` names, without decoding any.

    Args:
        spec: `emoji`, `emoji:placed`, `fashion-mnist`, a folder, a parquet or webdataset file, glob or folder, a Hub
            id `owner/name[:config]`; what exists on disk comes before the Hub. A glob of images or of their folders is
            a folder of those images. Or a Dataset or IterableDataset of the `datasets` library (a format or transform
            set on it is not used), a DatasetDict, and what is read into memory: a list of PIL images, arrays, paths or
            rows, a torch Dataset of those, see `given.in_memory`. An `ImageSource` comes back as it is.
        split: train, validation, test or any name the source has. A source without splits is all `train`.
        streaming: read shards as they come; otherwise, and for built-in sets and folders, any row can be asked for.
        image_column, label_column: their names, where they cannot be told from the columns' types and names.
        channels: of the pictures; by default the source's own (3 for image files).
        caption_column: the texts: strings or lists of strings; "column.field" for a field of a column of records. By
            default the first column called caption, text, txt, sentence, description or alt (or their plurals). In
            folders `<image>.txt` beside an image holds its texts, one a line, or a metadata.csv or .jsonl does.
        allow_outside_files: let rows name files outside of the folder of their shards, and addresses on the web.
            Otherwise such a row is a broken image; links in a folder are followed, wherever they lead.

    Raises:
        SourceError: nothing that can be read, no such split, or no such column; says what there is.
    """
    if isinstance(spec, ImageSource):
        return spec
    if not isinstance(spec, (str, os.PathLike)):
        return _finish(_of_an_object(spec, split, image_column), label_column, caption_column, channels)
    spec = os.fspath(spec)
    path = os.path.expanduser(spec)
    if spec in ("emoji", "emoji:placed"):
        source = _emoji(spec, split)
    elif spec == "fashion-mnist":
        dataset, split = local.fashion_mnist(split)
        source = ImageSource(spec, dataset, split, ("label",), channels=1)
    else:
        found = _open(spec, path, split, streaming)
        source = _from_dataset(printable(spec), found.dataset, found.split, image_column, found.shards)
        source.missing, source.home = found.missing, found.home
    source.outside = allow_outside_files
    return _finish(source, label_column, caption_column, channels)


def _of_an_object(data: Any, split: str, image_column: str | None) -> ImageSource:
    data = given.pick(data, split)
    dataset = data if given.is_dataset(data) else given.in_memory(data, image_column)
    if dataset is None:
        hint = ""
        if hasattr(data, "__iter__"):
            hint = " Of what can only be iterated make a stream: datasets.IterableDataset.from_generator(...)."
        raise SourceError(
            f"An object of type {type(data).__name__} is not a dataset that is known here.{hint} Give {ACCEPTED}."
        )
    name = getattr(getattr(dataset, "info", None), "dataset_name", None) or "the dataset given"
    split = str(getattr(dataset, "split", None) or split)
    return _from_dataset(name, dataset.with_format(None), split, image_column, None)


def _finish(
    source: ImageSource, label_column: str | None, caption_column: str | None, channels: int | None
) -> ImageSource:
    """Find what stands beside the image."""
    _find_labels(source, label_column)
    _find_captions(source, caption_column)
    if channels is not None:
        source.channels = channels
    return source


@dataclass(frozen=True)
class _Opened:
    """What a name stands for. shards: the reader of local shards; missing: see `ImageSource`; home: of its rows."""

    dataset: Any
    split: str
    shards: Any = None
    missing: tuple[str, ...] = ()
    home: Home | None = None


def _open(spec: str, path: str, split: str, streaming: bool) -> _Opened:
    """The dataset that a path or a Hub id names."""
    if os.path.isdir(path):
        return _open_folder(spec, path, split, streaming)
    if glob.has_magic(path) and not os.path.exists(path):
        root, names = local.matching(path)
        local.check_one_kind(spec, names)
        if images := [name for name in names if local.is_image(name)]:
            files = [*images, *local.beside(root, images)]
            return _Opened(local.image_folder(spec, root, files, split, whole=False)[0], split)
        return _open_shards(spec, [os.path.join(root, name) for name in names], split, streaming)
    if local.shard_kind(path) in (".parquet", ".tar"):
        return _open_shards(spec, [path] if os.path.exists(path) else [], split, streaming)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", spec) and not os.path.exists(path):
        return _open_hub(spec, split, streaming)
    near = nearest(spec.lower(), BUILT_IN)
    hint = f" Did you mean {near}?" if near else ""
    what = (
        "is a file of a kind that is not read here" if os.path.exists(path) else "is not a dataset that is known here"
    )
    raise SourceError(f"{printable(spec)!r} {what}.{hint} Give {ACCEPTED}.")


def _open_folder(spec: str, path: str, split: str, streaming: bool) -> _Opened:
    names = local.walk(path)
    local.check_one_kind(spec, names)
    if any(local.is_image(name) for name in names):
        dataset, missing = local.image_folder(spec, path, names, split)
        return _Opened(dataset, split, missing=missing)
    if files := [os.path.join(path, name) for name in names if local.shard_kind(name) in (".parquet", ".tar")]:
        return _open_shards(spec, files, split, streaming)
    kinds = sorted({os.path.splitext(name)[1] or "no extension" for name in names})
    found = f"files with {', '.join(kinds[:8])}" if kinds else "no file at all"
    raise SourceError(
        f"The folder {printable(spec)} holds no image and no .parquet or .tar file; it holds {printable(found)}."
    )


def _emoji(spec: str, split: str) -> ImageSource:
    from hf_ssl.data.emoji import KeywordCaptions, load_emoji, place

    split = local.pick_split(spec, split, ["train", "test", "all"])
    source = ImageSource(spec, load_emoji(split), split, ("group", "subgroup"), keep_alpha=True)
    source.caption_column, source.texts = "name", KeywordCaptions("name")
    source.random_render = spec == "emoji:placed"
    source.render = place if source.random_render else _centre
    return source


def _centre(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from hf_ssl.data.emoji import centre

    return centre(rgba)


def _open_shards(spec: str, files: list[str], split: str, streaming: bool) -> _Opened:
    import datasets

    kinds = {local.shard_kind(file) for file in files}
    if kinds not in ({".parquet"}, {".tar"}):
        found = f"matches files with {', '.join(sorted(kinds))}" if files else "matches no file"
        raise SourceError(f"{printable(spec)} {found}; give .parquet files or .tar files, or images.")
    files, split = local.shard_files(spec, files, split)
    try:
        if kinds == {".tar"}:
            dataset, features = open_tars(files, streaming)
            return _Opened(dataset, split, TarShards(dataset, files, features) if streaming else None)
        absolute = [os.path.abspath(file) for file in files]
        shards = ParquetShards(absolute)  # the builder's own error does not name the file that is broken
        if not shards.columns:
            raise SourceError(f"{printable(spec)} holds no rows.")
        with_rows = {"train": list(shards.columns)}
        dataset = datasets.load_dataset("parquet", data_files=with_rows, split="train", streaming=streaming)
    except SourceError:
        raise
    except Exception as error:
        if isinstance(error.__cause__, SourceError):  # out of `datasets`' hands
            raise error.__cause__ from None
        words = f"{odd}." if kinds == {".parquet"} and (odd := shards.odd_one()) else _cause(error)
        raise SourceError(f"{printable(spec)} cannot be read: {words}") from error
    return _Opened(dataset, split, shards, home=Home((os.path.commonpath([os.path.dirname(f) for f in absolute]),)))


def _open_hub(spec: str, split: str, streaming: bool) -> _Opened:
    import datasets

    repo, _, config = spec.partition(":")
    try:
        known = remote.steadily(lambda: datasets.get_dataset_split_names(repo, config or None), spec, remote.AT_START)
        split = local.pick_split(spec, split, known)
        options: dict[str, Any] = {"split": split, "streaming": streaming}
        dataset = remote.steadily(
            lambda: datasets.load_dataset(repo, config or None, **options), spec, remote.AT_START
        )
        return _Opened(dataset, split, home=Home(_caches(), repo))
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(
            f"{spec} is no file or folder here, and as a Hub dataset it cannot be loaded: {_cause(error)} "
            "Check the name, the network and, for a private dataset, `hf auth login`."
        ) from error


def _cause(error: BaseException) -> str:
    """The innermost complaint in one line: `datasets` wraps the one that tells."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'' if text.endswith('.') else '.'}"


def _from_dataset(spec: str, dataset: Any, split: str, image_column: str | None, shards: Any) -> ImageSource:
    """Find the image column, leave images undecoded, and call it `image`."""
    import datasets

    features = dataset.features
    if features is None:  # a stream that does not declare its columns: its first row shows them
        first = next(iter(dataset.iter(batch_size=1)))
        features = datasets.Features({name: datasets.Value("null") for name in first})
    name = _image_column(spec, features, image_column)
    if isinstance(features[name], datasets.Image):
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    if name != "image":
        dataset = dataset.remove_columns("image") if "image" in features else dataset
        dataset = dataset.rename_column(name, "image")
    source = ImageSource(spec, dataset, split)
    if shards:
        shards.use(name)
        if source.is_stream:
            source.shards = shards
        elif len(dataset) != sum(shards.lengths):
            raise SourceError(f"{spec} has {sum(shards.lengths):,} rows, of which {len(dataset):,} were read.")
    shape, source.dtype = _array_type(features[name])
    if shape is not None or source.dtype is not None:
        source.channels = given.channels_of(shape or np.asarray(_first(source)).shape)
    return source


def _caches() -> tuple[str, ...]:
    """Where files of the Hub lie on this machine."""
    import datasets
    import huggingface_hub.constants as hub

    folders = (hub.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    return tuple(os.path.abspath(os.path.expanduser(folder)) for folder in folders)


def _features(source: ImageSource) -> dict[str, Any]:
    """The columns and their types; for a stream that declares none, of its first row, every type unknown."""
    import datasets

    if source.dataset.features is not None:
        return source.dataset.features
    first: dict = next(iter(source.dataset.iter(batch_size=1)), {})
    return {name: datasets.Value("null") for name in first}


def _find_labels(source: ImageSource, asked: str | None) -> None:
    import datasets

    features = _features(source)
    if asked is not None:
        if asked not in features:
            raise SourceError(f"{source.name} has no column {asked!r}; its columns are {', '.join(features)}.")
        source.labels = (asked,)
    elif not source.labels:
        source.labels = tuple(
            key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel) or key in _LABEL_NAMES
        )


def _find_captions(source: ImageSource, asked: str | None) -> None:
    if asked is None and source.has_captions:
        return
    try:
        source.texts = find_captions(_features(source), asked, source.labels)
    except ValueError as error:
        raise SourceError(f"{source.name} {error}") from error
    source.caption_column = None if source.texts is None else source.texts.name
    source.labels = tuple(name for name in source.labels if name != asked)


def _image_column(spec: str, features: Any, asked: str | None) -> str:
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    stored = [name for name, kind in features.items() if isinstance(kind, dict) and {"bytes", "path"} & set(kind)]
    named = [name for name in given.IMAGE_NAMES if name in features]
    if asked is not None:
        candidates = [asked] if asked in features else []
    else:
        typed = images or stored
        candidates = [name for name in named if name in typed] or typed or named
    if len(candidates) == 1 or (candidates and candidates[0] in named):
        return candidates[0]
    problem = f"no column {asked!r}" if asked else "several image columns" if candidates else "no image column"
    raise SourceError(
        f"{spec} has {problem}; its columns are {', '.join(features)}. "
        "Name the one that holds the images with image_column."
    )


def _array_type(kind: Any) -> tuple[tuple[int, ...] | None, str | None]:
    """Declared shape and dtype of an array column: ((13, 64, 64), "uint8"), (None, "uint8") for lists, else Nones."""
    if hasattr(kind, "shape"):
        return tuple(kind.shape), kind.dtype
    depth = 0
    while hasattr(kind, "feature") or (isinstance(kind, list) and kind):
        kind, depth = kind.feature if hasattr(kind, "feature") else kind[0], depth + 1
    return (None, kind.dtype) if depth in (2, 3) else (None, None)


def _first(source: ImageSource) -> Any:
    row = next(iter(source.dataset)) if source.is_stream else source.dataset[0]
    return row["image"]
