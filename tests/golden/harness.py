"""Golden cases: numbers recorded from official code, and the runners that make our code produce the same ones.

A case is a folder <method>/<case> with case.json (config, tolerance) and tensors.safetensors (input.*, weight.*,
expected.*). A runner serves one kind, <method>/<case name up to its last underscore>; it takes all it needs from the
case's config, so a new case of a known kind needs no code.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

OUR_NAMES = {  # a folder of cases -> the method that they test, where its name is another
    "distribution_alignment": "fixmatch",  # a part of it
    "ibot": "dinov2",  # its losses, masks and steps; the method itself is not here yet
    "wmse": "w_mse",
}
NO_METHOD = {"knn", "lars"}  # these folders belong to no single method
WITHOUT_RUNNER: pytest.StashKey[list[tuple[str, bool]]] = pytest.StashKey()
_ORACLE = re.compile(r"(?:.*\.)?\w*oracle\w*\.(?P<what>.+)")


@dataclass(frozen=True)
class Case:
    name: str  # <method>/<case>
    config: dict[str, Any]
    tolerance: dict[str, float]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> "Case":
        about = json.loads((folder / "case.json").read_text())
        tensors = load_file(folder / "tensors.safetensors")
        return cls(f"{folder.parent.name}/{folder.name}", about["config"], about["tolerance"], tensors)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name starts with ``prefix.``, by the rest of their name."""
        return {key.removeprefix(prefix + "."): t for key, t in self.tensors.items() if key.startswith(prefix + ".")}

    def input(self, name: str) -> Tensor:
        return self.tensors[f"input.{name}"].clone()

    @property
    def world(self) -> int:
        """How many ranks the case was recorded on."""
        ranks = {int(found[1]) for key in self.tensors if (found := re.match(r"input\.rank(\d+)\.", key))}
        return max(ranks, default=self.config.get("world", 1) - 1) + 1

    @property
    def expected(self) -> dict[str, Tensor]:
        return self.part("expected")


class NotOurs(Exception):
    """A runner's word that a case's setting is none of ours, and why: its test is reported so, and never passed."""


Runner = Callable[[Case], dict[str, Tensor]]
RUNNERS: dict[str, Runner] = {}
WITHOUT: dict[str, dict[str, str]] = {}  # kind -> {how an expected tensor's name begins: why ours has no such thing}


def runner(kind: str, without: dict[str, str] | None = None) -> Callable[[Runner], Runner]:
    """Register a function for ``<method>/<kind>``: it returns {name without "expected.": tensor}.

    A case of a kind with ``without`` is never passed: all else is compared, then the test says what is not and why.
    """

    def register(function: Runner) -> Runner:
        if kind in RUNNERS:
            raise ValueError(f"two golden runners for {kind}")
        RUNNERS[kind], WITHOUT[kind] = function, without or {}
        return function

    return register


def discover(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden-dir {folder} is no folder")
    cases = sorted(path.parent for path in folder.glob("*/*/case.json"))
    if not cases:
        raise pytest.UsageError(f"--golden-dir {folder} has no <method>/<case>/case.json")
    return cases


def our_name(case: str) -> str:
    """The method that ``<folder>/<case>`` tests."""
    folder = case.split("/")[0]
    return OUR_NAMES.get(folder, folder)


def kind_of(case: str) -> str | None:
    """The longest registered kind that ``<method>/<case>`` starts with."""
    return max((kind for kind in RUNNERS if case.startswith(kind)), key=len, default=None)


def runner_of(case: str) -> Runner | None:
    kind = kind_of(case)
    return None if kind is None else RUNNERS[kind]


def without(case: Case) -> dict[str, str]:
    """{name: why} of the expected tensors that ours has no counterpart of."""
    excused = WITHOUT[kind_of(case.name) or ""]
    return {name: why for name in case.expected for start, why in excused.items() if name.startswith(start)}


def plan(folders: list[Path], ours: set[str]) -> tuple[dict[str, Path], list[tuple[str, bool]]]:
    """Cases to test by name, and (name, its method is in ``ours``) of those without a runner.

    A case without a runner whose method exists stays among the tests, where it fails.
    """
    cases = {f"{folder.parent.name}/{folder.name}": folder for folder in folders}
    stand = {name.split("/")[0]: our_name(name) for name in cases}
    missing = [(name, stand[name.split("/")[0]] in ours | NO_METHOD) for name in cases if runner_of(name) is None]
    for name, wanted in missing:
        if not wanted:
            del cases[name]
    return cases, missing


def differences(case: Case, got: dict[str, Tensor]) -> list[str]:
    """One sentence per expected tensor that is missing or off: |got − want| ≤ atol + rtol · max|want|."""
    words = []
    excused = without(case) if kind_of(case.name) else {}
    for name, want in case.expected.items():
        if name in excused:
            continue
        margin = case.tolerance["atol"] + case.tolerance["rtol"] * float(want.abs().max() if want.numel() else 0)
        if "cross_check" in name:  # the oracles' distance from each other: a property of the case itself
            if not float(want) <= margin + case.tolerance["atol"]:
                words.append(f"{name}: the case's own oracles differ by {float(want):.3g}")
            continue
        value = _value(name, got)
        if value is None:
            words.append(f"{name}: the runner produced no such tensor (it has {', '.join(sorted(got))})")
        elif value.shape != want.shape:
            words.append(f"{name}: shape {tuple(value.shape)} instead of {tuple(want.shape)}")
        elif want.numel():
            distance = float((value.detach().double() - want.double()).abs().max())
            if not distance <= margin:  # NaN is a difference too
                words.append(f"{name}: off by {distance:.3g}, allowed {margin:.3g}")
    return words


def _value(name: str, got: dict[str, Tensor]) -> Tensor | None:
    """Our value for an expected name; another oracle's ``*_oracle.loss`` is held against our only ``….loss``."""
    if name in got:
        return got[name]
    match = _ORACLE.fullmatch(name)
    if match is None:
        return None
    ours = [value for key, value in got.items() if key == match["what"] or key.endswith("." + match["what"])]
    return ours[0] if len(ours) == 1 else None


def gradients(scalar: Tensor, **wanted: Tensor) -> dict[str, Tensor]:
    return dict(zip(wanted, torch.autograd.grad(scalar, list(wanted.values())), strict=True))
