"""SSLImageProcessor: the base of every method's image processor. A method sets class attributes, above all `views`."""

import contextlib
import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, BitImageProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

from ..pixels import MODES, eight_bits, pil_pixels
from . import ops
from .followed import checked, follow
from .published import method_folder
from .views import VIEW_FIELDS, Draw, ViewGroup, draw_grid, draw_view, nearest, render_view, shares, shrink

_SERVICE_KEYS = {"image_processor_type", "processor_class", "_processor_class", "feature_extractor_type", "auto_map"}
_PER_GROUP = {"key", "count"}  # never spread over several groups: each group states its own


class SSLImageProcessor(BaseImageProcessor):
    """Turns pictures into the views a method trains on, reproducibly, and names the native processor for evaluation.

    Class attributes are the defaults, keyword arguments override them:

    - size: {"height", "width"} or pixels; every view group that states no size of its own gets it.
    - image_mean, image_std: one number per channel, of pictures scaled to 0..1.
    - views_on: "host", or "device", which leaves colour, blur, solarising, Cutout and erasing to `normalise`.
    - num_channels: 1, 3, 4, 13, ...; where it does not fit the default mean and std and none is given, every channel
      gets their average over the channels (.449 and .226).
    - eval_crop_pct: the share of the resized picture that the evaluation crop keeps.
    - views: the recipe, a list of `ViewGroup` fields; groups that share a `key` are concatenated along V in order.
    - any view field, such as scale=(.5, 1) or brightness=.3, applies to all groups (`count` where there is one group);
      a group's key with a dict, such as local_pixel_values={"count": 4}, applies to the groups of that key.

    An unknown name or a bad value raises ValueError. A subclass that sets `_view_boxes` also gets <key>_boxes, float32
    (B, V, 5): where each view was cut from, (left, top, width, height) as shares of the picture, and 1 if mirrored.
    """

    _view_boxes = False  # not for a run to choose: the method reads them or does not
    model_input_names = ["pixel_values"]
    size: Any = {"height": 224, "width": 224}
    image_mean: list[float] = [0.485, 0.456, 0.406]
    image_std: list[float] = [0.229, 0.224, 0.225]
    num_channels: int = 3
    eval_crop_pct: float = 0.875
    views_on: str = "host"
    views: list[dict[str, Any]] = [{"key": "pixel_values", "count": 2, "hflip": 0.5}]

    def __init__(self, **kwargs: Any):
        super().__init__()
        known = self._attributes()
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in known}
        attributes = {name: kwargs.get(name, getattr(type(self), name)) for name in known}
        attributes = copy.deepcopy(attributes)  # what the class says today is saved with the instance
        views = attributes["views"]
        if not isinstance(views, (list, tuple)) or not views or not all(isinstance(group, dict) for group in views):
            raise ValueError(f"{type(self).__name__}: views must be a list of dicts, one per group, not {views!r}.")
        views = list(views)
        self._spread({k: v for k, v in kwargs.items() if k not in known | _SERVICE_KEYS}, views)
        attributes["views"] = [{name: _plain(value) for name, value in group.items()} for group in views]
        attributes["size"] = _size_dict(attributes["size"])
        self.__dict__.update(attributes)
        self._set_statistics("image_mean" in kwargs, "image_std" in kwargs)
        self._compile()

    def _spread(self, overrides: dict[str, Any], views: list[dict[str, Any]]) -> None:
        """Writes view fields to all groups, and a key's dict of fields to the groups of that key."""
        keys = {group.get("key", "pixel_values") for group in views}
        for name, value in overrides.items():
            if name in keys and isinstance(value, dict):
                for group in (g for g in views if g.get("key", "pixel_values") == name):
                    group.update(value)
            elif name in VIEW_FIELDS and (name not in _PER_GROUP or len(views) == 1):
                for group in views:
                    group[name] = value
            elif name in VIEW_FIELDS:
                raise ValueError(
                    f"{name} differs between groups of views: pass for example {min(keys)}={{{name!r}: ..}}."
                )
            else:
                known = [*VIEW_FIELDS, *sorted((self._attributes() | keys) - set(VIEW_FIELDS))]
                raise ValueError(f"{type(self).__name__} has no argument {name!r}. {nearest(name, known)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and name in self._attributes():
            raise AttributeError(
                f"{name} is fixed once the processor is built: make another, {type(self).__name__}({name}=...)."
            )
        super().__setattr__(name, value)

    @classmethod
    def _attributes(cls) -> set[str]:
        """Names of the data attributes this class and its parents down to SSLImageProcessor declare."""
        names = {name for base in cls.__mro__[: cls.__mro__.index(SSLImageProcessor) + 1] for name in vars(base)}
        return {
            name
            for name in names
            if not name.startswith("_")
            and name != "model_input_names"
            and isinstance(getattr(cls, name), (str, int, float, list, tuple, dict, type(None)))
        }

    def _set_statistics(self, mean_given: bool, std_given: bool) -> None:
        if isinstance(self.num_channels, bool) or not isinstance(self.num_channels, int) or self.num_channels < 1:
            raise ValueError(f"num_channels must be a whole number of at least 1, not {self.num_channels!r}.")
        if self.views_on not in ("host", "device"):
            raise ValueError(f"views_on must be 'host' or 'device', not {self.views_on!r}.")
        if not 0 < self.eval_crop_pct <= 1:
            raise ValueError(f"eval_crop_pct must lie above 0 and not above 1, not {self.eval_crop_pct!r}.")
        for name, given in (("image_mean", mean_given), ("image_std", std_given)):
            values = getattr(self, name)
            values = [float(v) for v in (values if isinstance(values, Iterable) else [values] * self.num_channels)]
            if len(values) != self.num_channels and not given:
                values = [round(sum(values) / len(values), 6)] * self.num_channels
            if len(values) != self.num_channels:
                raise ValueError(
                    f"{name} has {len(values)} values for {self.num_channels} channels: give one per channel."
                )
            if name == "image_std" and min(values) <= 0:
                raise ValueError(f"image_std must be above 0 in every channel, not {values}.")
            self.__dict__[name] = values

    def _compile(self) -> None:
        size = (self.size["height"], self.size["width"])
        groups = [ViewGroup.from_dict(g, size, f"views[{i}]") for i, g in enumerate(self.views)]
        self._groups = checked(group for group in groups if group.count)
        mean, std = np.asarray(self.image_mean), np.asarray(self.image_std)
        self._fill = np.clip(np.rint(mean * 255), 0, 255).astype(np.uint8)
        self._scale, self._shift = (1 / (255 * std)).tolist(), (-mean / std).tolist()
        shapes: dict[str, tuple[int, int]] = {}
        for i, group in enumerate(self._groups):
            if shapes.setdefault(group.key, group.size) != group.size:
                raise ValueError(f"views[{i}]: {group.key} has size {shapes[group.key]} before and {group.size} here.")
            if self._view_boxes and (group.vflip or group.rotation or group.translate):
                raise ValueError(
                    f"views[{i}]: vflip, rotation and translate must be 0: {type(self).__name__} hands out the boxes "
                    "of its views, which would not tell them."
                )
        self.model_input_names = list(shapes)
        self._sizes = shapes

    @property
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        """(height, width) of each key's views."""
        return dict(self._sizes)

    @property
    def num_views(self) -> int:
        """Views per picture, over all groups."""
        return self.count_views()

    def count_views(self, keys: Sequence[str] | None = None) -> int:
        """Views per picture, over the groups of these keys (None: all). ValueError for a key that no group has."""
        return sum(group.count for group in self._groups_of(keys))

    def _groups_of(self, keys: Sequence[str] | None) -> list[ViewGroup]:
        """The groups of these keys, in the recipe's order whatever the order of the keys."""
        if keys is None:
            return self._groups
        keys = [keys] if isinstance(keys, str) else keys
        for key in keys:
            if key not in self.model_input_names:
                raise ValueError(f"{type(self).__name__} has no views {key!r}. {nearest(key, self.model_input_names)}")
        return checked(group for group in self._groups if group.key in keys)

    def draw(
        self,
        images: Sequence[Any],
        rng: np.random.Generator,
        keys: Sequence[str] | None = None,
        out: dict[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """One picture's views: {key: uint8 (V, H, W, C)}; the same `rng` state gives the same bytes.

        With `views_on` = "device" also {key_draws: float32 (V, P)}, what `normalise` needs to finish them, and where
        the class asks for boxes {key_boxes: float32 (V, 5)}.

        images: one uint8 (H, W, num_channels) array per view, in the groups' order; the same object may repeat. Or a
            picture still to be decoded: its shape, and decode(shrink) -> (array, 1, 2, 4 or 8), the picture at that
            part of its size if all that is done with it shrinks it by `shrink` or more. A grid is of its first one.
        keys: draw the groups of these keys alone, as if the recipe had no others; None draws all.
        out: what an earlier call returned, or arrays of the same shapes, to write into and return.
        """
        groups = self._groups_of(keys)
        plan = self._plan(images, groups, rng)
        ready = {id(image): (image, 1) for image, _, _ in plan}
        for name, (image, _) in ready.items():
            if hasattr(image, "decode"):
                ready[name] = image.decode(min(shrink(draw, group) for use, draw, group in plan if use is image))
        out = self._buffers(groups) if out is None else out
        place = dict.fromkeys(out, 0)
        for image, choices, group in plan:
            key, (pixels, shrunk) = group.key, ready[id(image)]
            target = out[key][place[key]]
            render_view(pixels, choices, group, self._fill, target, self.views_on == "host", shrunk)
            if (draws := out.get(f"{key}_draws")) is not None:
                draws[place[key]] = _device().pack(choices, group, draws.shape[1])
            if self._view_boxes:
                out[f"{key}_boxes"][place[key]] = shares(choices, image.shape)
            place[key] += 1
        return out

    def _plan(
        self, images: Sequence[Any], groups: Sequence[ViewGroup], rng: np.random.Generator
    ) -> list[tuple[Any, Draw, ViewGroup]]:
        """Each view's picture, choices and group, from the sizes of the pictures alone."""
        order = [group for group in groups for _ in range(group.count)]
        if len(images) != len(order):
            raise ValueError(f"draw needs one picture per view, {len(order)}, and got {len(images)}.")
        for image in {id(image): image for image in images}.values():
            if image.dtype != np.uint8 or len(image.shape) != 3 or image.shape[2] != self.num_channels:
                raise ValueError(
                    f"draw needs uint8 pictures of shape (height, width, {self.num_channels}) and got {image.dtype} "
                    f"{image.shape}."
                )
        plan: list[tuple[Any, Draw, ViewGroup]] = []
        while len(plan) < len(order):
            group, image = order[len(plan)], images[len(plan)]
            if group.crops_of:
                plan += [(use, follow(d, g, group), group) for use, d, g in plan if g.key == group.crops_of]
                continue
            height, width = image.shape[:2]
            draws = draw_grid(group, height, width, rng) if group.grid else [draw_view(group, height, width, rng)]
            plan += [(image, draw, group) for draw in draws]
        return plan

    def _buffers(self, groups: Sequence[ViewGroup]) -> dict[str, np.ndarray]:
        """Empty arrays for one picture's views, and for their choices where the device finishes them."""
        out: dict[str, np.ndarray] = {}
        for key, first in {group.key: group for group in reversed(groups)}.items():
            count = sum(group.count for group in groups if group.key == key)
            out[key] = np.empty((count, *first.size, self.num_channels), np.uint8)
            width = _device().columns(g for g in groups if g.key == key) if self.views_on == "device" else 0
            if width:
                out[f"{key}_draws"] = np.empty((count, width), np.float32)
            if self._view_boxes:
                out[f"{key}_boxes"] = np.empty((count, 5), np.float32)
        names = [group.key + part for group in groups for part in ("", "_draws", "_boxes")]
        return {name: out[name] for name in names if name in out}

    def normalise(self, views: torch.Tensor, params: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 (..., H, W, C) to float32 (..., C, H, W), (x / 255 - mean) / std, on the tensor's own device.

        In memory the channels stay last. params: float32 (..., P), what `draw` chose for each view and left to do.
        """
        height, width, channels = views.shape[-3:]
        if params is not None:
            flat = views.reshape(-1, height, width, channels), params.reshape(-1, params.shape[-1])
            is_jittered = any(map(_device().has_jitter, self._groups))
            done = _device().finish(*flat, self.image_mean, self.image_std, is_jittered)
            return done.reshape(*views.shape[:-3], channels, height, width)
        scale, shift = (  # filled in place: a copy from the host would wait for the device
            torch.cat([views.new_full((1,), value, dtype=torch.float32) for value in values]).repeat(width)
            for values in (self._scale, self._shift)
        )
        values = views.reshape(-1, width * channels).float()  # whole rows: torch is slow on an inner axis of 3
        return torch.addcmul(shift, values, scale, out=values).view(views.shape).movedim(-1, -3)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its uint8 views normalised, `<key>_draws` used up, and all else as it was."""
        batch = dict(batch)
        for key in self.model_input_names:
            if key in batch and batch[key].dtype == torch.uint8:
                batch[key] = self.normalise(batch[key], batch.pop(f"{key}_draws", None))
        return batch

    def preprocess(
        self, images: Any, return_tensors: str | None = "pt", seed: int | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Views of one picture or a list: {key: (B, V, C, H, W)}. PIL, or uint8 / 0..1 float HWC, CHW or HW arrays.

        With `seed`, picture i's views depend on (seed, i) alone.
        """
        if kwargs:
            raise ValueError(f"Unknown argument {next(iter(kwargs))!r}: a call takes images, return_tensors and seed.")
        single = isinstance(images, Image.Image) or (hasattr(images, "ndim") and images.ndim <= 3)
        batch = [images] if single else list(images)
        if not batch:
            raise ValueError("There is no picture in the list.")
        drawn = []
        for i, image in enumerate(batch):
            array = to_array(image, self.num_channels)
            rng = np.random.default_rng(None if seed is None else (seed, i))
            drawn.append(self.draw([array] * self.num_views, rng))
        views = {name: torch.from_numpy(np.stack([one[name] for one in drawn])) for name in drawn[0]}
        data = self.prepare(views)
        if return_tensors != "pt":
            data = {key: value.numpy() for key, value in data.items()}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def undo(self, pixel_values: Any) -> np.ndarray:
        """Normalised (..., C, H, W) back to uint8 (..., H, W, C), for pictures."""
        values = torch.as_tensor(pixel_values).detach().float().cpu().numpy()
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (self.image_mean, self.image_std))
        return np.clip(np.rint(np.moveaxis((values * std + mean) * 255, -3, -1)), 0, 255).astype(np.uint8)

    def eval_processor(self) -> BitImageProcessor:
        """The native processor for evaluation and export, which plain transformers loads: the same mean and std.

        Shortest edge to round(size / eval_crop_pct), bicubic, centre crop; where size is not square, both edges.
        Pictures become RGB where num_channels is 3. The native class converts nothing else: an RGB picture given to a
        1-channel one comes out with 3 channels; arrays with other than 1, 3 or 4 channels need input_data_format.
        """
        height, width = self.size["height"], self.size["width"]
        resized: Any = {"height": round(height / self.eval_crop_pct), "width": round(width / self.eval_crop_pct)}
        return BitImageProcessor(
            size={"shortest_edge": resized["height"]} if height == width else resized,
            crop_size={"height": height, "width": width},
            resample=PILImageResampling.BICUBIC,
            image_mean=list(self.image_mean),
            image_std=list(self.image_std),
            do_convert_rgb=self.num_channels == 3,
        )

    def native_processor(self) -> BaseImageProcessor:
        """The native processor that an export holds in its root; a method with a native class overrides it."""
        return self.eval_processor()

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers; of a published repo, whose root holds the native processor, what its ``ssl/`` says."""
        if not kwargs.get("subfolder"):
            with contextlib.suppress(OSError):  # a processor may lie in a folder without a model
                kwargs["subfolder"] = method_folder(pretrained_model_name_or_path, kwargs) or ""
        return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From a saved dict; `kwargs` that this class knows override it as they would in the constructor."""
        saved = dict(image_processor_dict)
        return_unused = kwargs.pop("return_unused_kwargs", False)
        known = (
            cls._attributes()
            | set(VIEW_FIELDS)
            | {g.get("key", "pixel_values") for g in saved.get("views", cls.views)}
        )
        used = {k: v for k, v in kwargs.items() if k in known or not return_unused}
        if used.get("num_channels", saved.get("num_channels")) != saved.get("num_channels"):
            for name in {"image_mean", "image_std"} - set(used):  # the class's own, spread over the new channels
                saved.pop(name, None)
        processor = cls(**{**saved, **used})
        return (processor, {k: v for k, v in kwargs.items() if k not in used}) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the public attributes and the class's name."""
        state = {k: copy.deepcopy(v) for k, v in self.__dict__.items() if k in self._attributes()}
        return {**state, "image_processor_type": type(self).__name__}


def _device() -> Any:
    from . import device  # needed by views_on="device" alone

    return device


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _size_dict(size: Any) -> dict[str, int]:
    pair: Any = [size.get("height"), size.get("width")] if isinstance(size, dict) else size
    pair = pair if isinstance(pair, (list, tuple)) else [pair, pair]
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(f"size must be pixels, [height, width] or {{'height': .., 'width': ..}}, not {size!r}.")
    return {"height": pair[0], "width": pair[1]}


def to_array(image: Any, channels: int) -> np.ndarray:
    """A PIL picture, array or tensor (HW, HWC or CHW; uint8, or float in 0..1) as uint8 (H, W, channels)."""
    if isinstance(image, Image.Image):
        if channels not in MODES:
            raise ValueError(f"A PIL picture (mode {image.mode}) has no {channels} channels: pass an array.")
        if image.mode in ("I", "F"):
            raise ValueError(f"A PIL picture of mode {image.mode} has no fixed range: scale it to uint8 first.")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray(eight_bits(np.asarray(image)))
        image = pil_pixels(image, channels)
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise ValueError(f"A picture has two or three axes; this one has shape {array.shape}.")
    if array.shape[2] != channels and array.shape[2] not in (1, 3) and array.shape[0] in (channels, 1, 3):
        array = array.transpose(1, 2, 0)
    if np.issubdtype(array.dtype, np.floating) and array.size and array.min() >= 0 and array.max() <= 1:
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"A picture must be uint8, or float within 0 to 1; this one is {array.dtype}, {array.shape}.")
    if array.shape[2] == 1 and channels == 3:
        array = np.repeat(array, 3, axis=2)
    elif array.shape[2] == 3 and channels == 1:
        array = ops.grayscale(np.ascontiguousarray(array))
    if array.shape[2] != channels:
        raise ValueError(f"This processor takes {channels} channels; the picture has shape {array.shape}.")
    return np.ascontiguousarray(array)
