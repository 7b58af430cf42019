"""The map of the house: floors, what lies at the top, and what an import costs."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from hf_ssl.methods import METHODS
from tests import PATIENCE

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_ssl"
FILES = sorted(PACKAGE.rglob("*.py"))
CORE = {
    "modeling", "multi_view", "momentum", "heads", "memory", "masks", "schedules", "losses", "distributed",
    "backbones", "semi_supervised",
}  # fmt: skip
# These know nothing of pictures or methods.
LOW = {"lazy", "spelling", "documents", "loading", "limits", "pixels", "files", "untouched", "finite"}
BELOW = {  # what each part of hf_ssl may import, besides itself; "" is hf_ssl/__init__.py
    "cli": {"training", "evaluation", "hub", "methods", "processing", "data", ""} | CORE | LOW,
    "hub": {"evaluation", "methods", "processing", "data", ""} | CORE | LOW,
    "training": {"hub", "evaluation", "methods", "processing", "data", ""} | CORE | LOW,
    "evaluation": {"backbones", "data", ""} | LOW,
    "registration": {"methods"},
    "methods": {"processing"} | CORE | LOW,
    "processing": LOW,
    "data": LOW,
    **{name: LOW for name in LOW},
    **{name: {"processing"} | CORE | LOW for name in CORE},
}
TOP = {
    "hf_ssl", "recipes", "tests", "model_cards", "pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE", "NOTICE",
    "docs", "CHANGELOG.md",
}  # fmt: skip


def imports(file: Path) -> set[tuple[str, ...]]:
    """Every hf_ssl module that a file imports, anywhere in it, as parts after ``hf_ssl``."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = (*base, *(node.module.split(".") if node.module else ()))
            targets = [(*stem, alias.name) for alias in node.names]
        else:
            continue
        found |= {target[1:] for target in targets if target[0] == "hf_ssl"}
    return found


def part(path: tuple[str, ...]) -> str:
    """The part of the house that a dotted path lies in; names of hf_ssl/__init__ itself are ""."""
    known = {*BELOW, *(child.stem for child in PACKAGE.iterdir())}
    return path[0] if path and path[0] in known else ""


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])
def test_a_file_fits_the_map(file: Path) -> None:
    own = file.relative_to(PACKAGE).with_suffix("").parts
    if own == ("__init__",):
        return
    assert own[0] in BELOW, f"hf_ssl/{own[0]} is on no floor: DESIGN.md and this table name them all"
    for target in imports(file):
        to = part(target)
        assert to == own[0] or to in BELOW[own[0]], (
            f"{own[0]} may not import hf_ssl.{'.'.join(target)}: imports go down"
        )


# A method imports the method that its paper extends, never one that it merely resembles.
EXTENDS = {
    "deepcluster_v2": {"swav"},  # of the same paper
    "dinov2": {"dino"},
    "dinov3": {"dinov2"},
    "infomin": {"moco"},
    "pirl": {"instdisc"},
    "pmsn": {"msn"},
    "ressl": {"moco"},
    "sela_v2": {"deepcluster_v2", "swav"},  # v2 of SeLa is in SwAV's paper
}


def test_a_method_imports_only_the_method_that_its_paper_extends() -> None:
    found = {
        name: others
        for name, (module, _) in METHODS.items()
        if (others := _methods_in(PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")) - {name})
    }
    assert found == EXTENDS, "what unrelated methods share moves down to a named part"


def _methods_in(file: Path) -> set[str]:
    return {part for target in imports(file) if target[0] == "methods" for part in target[1:] if part in METHODS}


def test_methods_import_each_other_without_a_circle() -> None:
    assert not _circle({name: set(EXTENDS.get(name, ())) for name in METHODS})


def test_no_module_at_the_root_serves_one_method_alone() -> None:
    """A part that one method uses belongs into that method's file."""
    users: dict[str, set[str]] = {name: set() for name in CORE}
    for file in FILES:
        own = file.relative_to(PACKAGE).with_suffix("").parts
        for target in imports(file):
            if part(target) in CORE and own != (part(target),):
                users[part(target)].add("/".join(own))
    alone = {name: used for name, used in users.items() if len(used) == 1 and next(iter(used)).startswith("methods/")}
    assert set(alone) <= {"semi_supervised"}, alone  # FixMatch is the first of its family


def test_the_core_has_no_circle() -> None:
    """Within the lowest floor too, imports have one direction."""
    circle = _circle({name: {part(t) for file in _files(name) for t in imports(file)} & CORE for name in CORE})
    assert not circle, f"a circle among {circle}"


def _files(name: str) -> list[Path]:
    return [PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else sorted((PACKAGE / name).rglob("*.py"))


def _circle(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left of a graph {node: nodes it needs} when all that need nothing are taken away, again and again."""
    while free := [name for name, needs in graph.items() if not needs - {name}]:
        graph = {name: needs - set(free) for name, needs in graph.items() if name not in free}
    return graph


def test_the_top_level_holds_what_the_design_names() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout:
        entries = {line.split("/")[0] for line in listed.stdout.splitlines()}
    else:  # an unpacked archive
        entries = {path.name for path in ROOT.iterdir()}
    extra = {entry for entry in entries if not entry.startswith(".")} - TOP
    assert not extra, f"no place at the top level for {sorted(extra)}"


def test_the_checks_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with one import of every bad kind is seen through."""
    folder = tmp_path / "hf_ssl" / "methods" / "masked"
    folder.mkdir(parents=True)
    (folder / "bad.py").write_text(
        "import hf_ssl.training.trainer\nfrom ...evaluation import knn\nfrom ..joint_embedding import dino\n"
        "def f():\n    from .mae import MAEConfig\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert imports(folder / "bad.py") == {
        ("training", "trainer"), ("evaluation", "knn"), ("methods", "joint_embedding", "dino"),
        ("methods", "masked", "mae", "MAEConfig"),
    }  # fmt: skip


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    installed = {str(file) for file in metadata.files("hf-ssl") or ()}
    assert "hf_ssl/__init__.py" not in installed or "hf_ssl/py.typed" in installed  # the wheel ships it


def test_importing_hf_ssl_is_cheap_and_enough() -> None:
    """Neither torch nor transformers is imported; afterwards the Auto classes know every method, models or not."""
    code = (
        "import sys, hf_ssl\n"
        "heavy = {'torch', 'transformers', 'datasets', 'cv2', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert {'SSLTrainer', 'DINOConfig', 'METHODS'} <= set(dir(hf_ssl))\n"
        "from hf_ssl.backbones import PRESETS  # imports the Auto classes from the inside\n"
        "from transformers import AutoConfig\n"
        "for name in hf_ssl.METHODS: AutoConfig.for_model('ssl_' + name)\n"
        "from transformers import AutoModelForPreTraining as auto\n"
        "assert auto._model_mapping[hf_ssl.DINOConfig] is hf_ssl.DINOForPreTraining\n"
        "assert all(getattr(hf_ssl, name) is not None for name in hf_ssl.__all__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
