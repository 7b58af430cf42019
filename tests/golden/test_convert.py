"""Official weights through ``hf-ssl convert`` and plain AutoModel, without hf_ssl, give the recorded features.

The cases are those of --golden-dir that hold a whole official state dict of a backbone.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ssl.cli import main
from hf_ssl.hub import load_method
from tests import PATIENCE
from tests.golden.harness import Case, differences, discover
from tests.without_hf_ssl import BLOCKED

KINDS = {"dino/vit": "dino", "mae/model": "mae", "ijepa/model": "ijepa"}
_PLAIN = (
    BLOCKED
    + """
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

for folder in sorted(Path(sys.argv[1]).iterdir()):
    given = load_file(folder / "given.safetensors")
    model, report = AutoModel.from_pretrained(folder / "model", output_loading_info=True)
    assert not report["unexpected_keys"], report
    assert all(key.startswith("pooler.") for key in report["missing_keys"]), report
    AutoImageProcessor.from_pretrained(folder / "model")
    with torch.no_grad():
        if "noise" in given:  # MAE's encoder sees the patches of the lowest noise alone, in that order
            tokens = model.embeddings(given["images"])
            keep = given["noise"].argsort(1)[:, : int(given["kept"])]
            patches = tokens[:, 1:].gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            tokens = torch.cat([tokens[:, :1], patches], dim=1)
            for layer in model.layers:
                tokens = layer(tokens)
            tokens = model.layernorm(tokens)
        else:
            tokens = model(given["images"]).last_hidden_state
    save_file({"tokens": tokens.contiguous()}, folder / "plain.safetensors")
assert not any(name.split(".")[0] == "hf_ssl" for name in sys.modules)
"""
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "converted_case" in metafunc.fixturenames:
        folders = discover(Path(metafunc.config.getoption("golden_dir")))
        mine = [f for f in folders if any(f"{f.parent.name}/{f.name}".startswith(kind) for kind in KINDS)]
        metafunc.parametrize("converted_case", [f"{f.parent.name}/{f.name}" for f in mine])


def official_file(case: Case, method: str) -> dict:
    """The case's weights in the shape in which the method's authors release them."""
    weights = case.part("weight")
    if method == "dino":
        return weights
    if method == "mae":
        return {"model": weights}
    groups = ("encoder", "target_encoder", "predictor")
    nested: dict = {group: {} for group in groups}
    for name, tensor in weights.items():
        group, _, rest = name.partition(".")
        nested[group][f"module.{rest}"] = tensor
    return nested | {"epoch": 300}


def settings(case: Case, method: str) -> dict:
    return case.config[{"dino": "vit", "mae": "mae", "ijepa": "encoder"}[method]]


def images_of(case: Case, method: str) -> Tensor:
    if method != "dino":
        return case.input("images")
    side = settings(case, method).get("img_size", 224)
    side = side[0] if isinstance(side, list) else side
    native = next(i for i, size in enumerate(case.config["sizes"]) if list(size) == [side, side])
    return case.input(f"images{native}")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every case converted by the command and read by one plain transformers process."""
    root = tmp_path_factory.mktemp("converted")
    for folder in discover(Path(request.config.getoption("golden_dir"))):
        name = f"{folder.parent.name}/{folder.name}"
        method = next((method for kind, method in KINDS.items() if name.startswith(kind)), None)
        if method is None:
            continue
        case, place = Case.load(folder), root / name.replace("/", "-")
        place.mkdir()
        torch.save(official_file(case, method), place / "official.pth")
        sizes = settings(case, method)
        argv = ["convert", str(place / "official.pth"), "--method", method, "--output", str(place / "model")]
        argv += ["--num_heads", str(sizes.get("num_heads", 12))]
        argv += ["--layer_norm_eps", str(case.config.get("ln_eps", 1e-6))]
        argv += ["--decoder_num_heads", str(sizes.get("decoder_num_heads", 16))] if method == "mae" else []
        assert main(argv) == 0, name
        given = {"images": images_of(case, method)}
        if method == "mae":
            kept = int(case.input("noise").shape[1] * (1 - case.config["mask_ratio"]))
            given |= {"noise": case.input("noise"), "kept": torch.tensor(kept)}
        save_file(given, place / "given.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, str(root)], capture_output=True, text=True, timeout=PATIENCE, cwd=root
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def test_plain_transformers_gives_the_recorded_features(
    converted_case: str, plain: Path, request: pytest.FixtureRequest
) -> None:
    case = Case.load(Path(request.config.getoption("golden_dir")) / converted_case)
    place = plain / converted_case.replace("/", "-")
    tokens = load_file(place / "plain.safetensors")["tokens"]
    method = next(method for kind, method in KINDS.items() if converted_case.startswith(kind))
    if method == "dino":
        native = next(i for i in range(9) if torch.equal(case.input(f"images{i}"), images_of(case, method)))
        got = {f"tokens{native}": tokens, f"cls{native}": tokens[:, 0]}
    elif method == "mae":
        got = {"latent": tokens}
    else:
        got = {"target_full": tokens}
    expected = {f"expected.{name}": case.expected[name] for name in got}
    words = differences(Case(case.name, case.config, case.tolerance, expected), got)
    assert not words, "\n".join(words)
    report = json.loads((place / "model" / "conversion.json").read_text())
    accounted = [*report["converted"], *report["left_out"]]
    assert len(accounted) == len(set(accounted)) >= len(case.part("weight"))
    if method == "mae":
        mae, _ = load_method(place / "model")
        with torch.no_grad():
            prediction, mask, _ = mae.eval().predict(case.input("images"), case.input("noise"))
        words = differences(
            Case(
                case.name, case.config, case.tolerance, {f"expected.{n}": case.expected[n] for n in ("pred", "mask")}
            ),
            {"pred": prediction, "mask": mask},
        )
        assert not words, "\n".join(words)
