from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A real photograph, uint8 (420, 480, 3)."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return np.ascontiguousarray(np.asarray(Image.open(path).convert("RGB"))[40:460, 20:500])
