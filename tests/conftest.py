"""What every test shares: the golden option, one thread per process, tiny models and pictures."""

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # `tests.…` and an uninstalled `hf_ssl` import the same way under every runner
    sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=str(ROOT / "tests" / "golden" / "cases"),
        help="Folder of golden cases: <method>/<case>/{case.json,tensors.safetensors}.",
    )


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    from tests.golden.harness import WITHOUT_RUNNER, discover, plan

    missing = config.stash.get(WITHOUT_RUNNER, [])
    ran = [
        report.nodeid for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "nodeid")
    ]
    if not missing and config.getoption("numprocesses", None) and any("test_golden" in name for name in ran):
        from tests.golden.test_golden import KINDS  # the processes that ran the tests kept theirs to themselves

        missing = plan(discover(Path(config.getoption("golden_dir"))), KINDS)[1]
    if missing:
        terminalreporter.section("golden cases without a runner")
        for name, wanted in missing:
            terminalreporter.line(
                f"{name}: {'FAILED, its method is here' if wanted else 'its method is not here yet'}"
            )


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _plain_logger() -> None:
    """A command that a test ran in this process has set up hf_ssl's logger; ``caplog`` needs it as it was imported."""
    logger = logging.getLogger("hf_ssl")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
