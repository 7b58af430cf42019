"""What each kind of training data brings: flags, sources, how a method is built on it and measured while it trains.

One file for each value of ``SSLModel.reads``. It holds one subclass of ``Kind`` and, where the kind has flags of its
own, one dataclass whose name ends in ``Arguments``. Nothing else depends on what a method reads, so that a new kind of
data is a new file here.
"""

import importlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ...data.labels import LabeledImages
    from ...data.sources import ImageSource
    from ...data.splits import Division
    from ...modeling import SSLModel
    from ...processing import SSLImageProcessor
    from ..arguments import DataArguments
    from ..build import Request


@dataclass
class Sources:
    """What a run trains on. train: with labelled images beside them, those without a label."""

    train: "ImageSource"
    labeled: "LabeledImages | None" = None
    unlabeled: dict[str, Any] | None = None  # dataset and split of the images without labels, where they are others


class Kind:
    """One kind of training data. The defaults are those of images alone."""

    arguments: ClassVar[type | None] = None  # the dataclass of its flags
    has_classes: ClassVar[bool] = False  # whether the model tells classes apart, whose names it is built with
    tested_by_texts: ClassVar[bool] = False  # whether images with texts and no label can be tested on
    has_bank: ClassVar[bool] = True  # whether ``measure`` compares with other labelled images

    def source_options(self, kind_args: Any) -> dict[str, Any]:
        """Options of ``load_source`` beside those of ``DataArguments``. kind_args: of class ``arguments``."""
        return {}

    def sources(
        self,
        division: "Division",
        data: "DataArguments",
        own: Any,
        seed: int,
        options: dict[str, Any],
        said: list[str],
    ) -> Sources:
        """What trains, of the rows that ``division`` leaves for training. said: sentences for the user are added."""
        return Sources(division.train)

    def labeled(self, model: "SSLModel", images: "ImageSource", seed: int) -> "LabeledImages | None":
        """The labelled images of a trainer that was given none."""
        return None

    def build(self, request: "Request") -> "tuple[SSLModel, SSLImageProcessor]":
        """The method and its processor."""
        raise NotImplementedError

    def measure(
        self,
        method: Any,
        views: "SSLImageProcessor",
        bank: "ImageSource",
        queries: "ImageSource",
        options: dict[str, Any],
    ) -> dict[str, float]:
        """{name: value} for ``queries``, while the method trains. options: of the functions in ``evaluation``."""
        raise NotImplementedError


def kind_of(reads: str) -> Kind:
    """The kind of data that ``reads`` names."""
    module = importlib.import_module(f"{__name__}.{reads}")
    own = (value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__)
    return next(value for value in own if inspect.isclass(value) and issubclass(value, Kind))()
