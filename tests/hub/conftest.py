"""Scenarios in processes of their own, each run once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a function of tests/hub/scenarios.py found, by its name."""
    found: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            done = subprocess.run(
                [sys.executable, "-m", "tests.hub.scenarios", name, str(folder)], capture_output=True, text=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=folder, timeout=PATIENCE,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
            found[name] = json.loads((folder / f"{name}.json").read_text())
        return found[name]

    return run
