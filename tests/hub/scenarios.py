"""What the tests of the Hub do in processes of their own: huggingface_hub reads its endpoint when it is imported.

``python -m tests.hub.scenarios NAME DIR`` serves a loopback Hub, runs the scenario against it with the real client and
leaves DIR/NAME.json for the test to judge.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from tests import PATIENCE
from tests.hub_server import LoopbackHub
from tests.without_hf_ssl import BLOCKED

ROOT = Path(__file__).parents[2]
REPO = "alice/tiny"
SECRET = "hf_ThisMustNeverBeWritten42"
TEXTS = ["red waves", "blue checks", "big grey stripes"]


def trained(name: str, folder: Path, **arguments: Any) -> Any:
    """A trainer of a tiny method after a few steps on pictures of two classes, with captions."""
    import datasets
    import torch

    from hf_ssl import SSLTrainer, SSLTrainingArguments
    from hf_ssl.data import load_source
    from hf_ssl.data.labels import LabeledImages, draw_labeled
    from tests.contract.tiny import CAPTIONS, RESNET, VIT, build, pictures, processor

    torch.set_num_threads(1)
    rows = {"image": pictures(32, seed=1), "label": [i % 4 for i in range(32)], "text": CAPTIONS[:16] * 2}
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list("abcd")),
        "text": datasets.Value("string"),
    }
    source = load_source(datasets.Dataset.from_dict(rows, datasets.Features(features)))
    options: dict[str, Any] = {}
    if name == "fixmatch":
        options["labeled"] = LabeledImages(*draw_labeled(source, None, 2, None, None, 0), 2)
    defaults = {
        "per_device_train_batch_size": 8, "max_steps": 20, "learning_rate": 0.01, "save_strategy": "no",
        "logging_steps": 10, "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    args = SSLTrainingArguments(str(folder), **{**defaults, **arguments})
    backbone = RESNET if name == "simclr" else VIT
    return SSLTrainer(build(name, backbone), args, source, processor(name), **options)


def pixels(processor: Any) -> Any:
    from tests.contract.tiny import pictures

    return processor.eval_processor()(pictures(3, seed=11), return_tensors="pt")["pixel_values"]


# --- publish and load elsewhere -------------------------------------------------------------------------------------

PLAIN = (
    BLOCKED
    + """import json, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, pipeline

torch.set_num_threads(1)
found = {}
raw = load_file(sys.argv[1] + "/pictures.safetensors")["images"]
images = [Image.fromarray(image.numpy()) for image in raw]
for repo, texts in json.loads(sys.argv[2]).items():
    processor, model = AutoImageProcessor.from_pretrained(repo), AutoModel.from_pretrained(repo)
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if repo.endswith("clip"):
            features = model.get_image_features(pixel_values=pixel_values).pooler_output
            ask = pipeline("zero-shot-image-classification", model=repo)
            answers = [ask(image, candidate_labels=texts, hypothesis_template="{}") for image in images]
            found[repo] = {"zero_shot": [{one["label"]: one["score"] for one in answer} for answer in answers]}
        else:
            out = model(pixel_values)
            vit = model.config.model_type == "vit"
            features = out.last_hidden_state[:, 0] if vit else out.pooler_output.flatten(1)
            extracted = pipeline("image-feature-extraction", model=repo)(images[0])
            found[repo] = {"same": torch.allclose(torch.tensor(extracted), out[0][:1], atol=1e-5)}
        if repo.endswith("fixmatch"):
            labels = pipeline("image-classification", model=repo)(images[0], top_k=4)
            found[repo]["labels"] = {one["label"]: one["score"] for one in labels}
    found[repo]["features"] = features.tolist()
assert not any(name.split(".")[0] == "hf_ssl" for name in sys.modules)
json.dump(found, open(sys.argv[1] + "/plain.json", "w"))
"""
)


def publish(folder: Path, hub: LoopbackHub) -> dict[str, Any]:
    """Three families trained for 20 steps and pushed by trainer, model and command line; loaded without hf_ssl."""
    import torch
    from safetensors.torch import save_file

    from hf_ssl import SimCLRForPreTraining, SimCLRImageProcessor
    from hf_ssl.cli import main
    from hf_ssl.hub import load_method
    from tests.contract.tiny import pictures

    found: dict[str, Any] = {}
    for name in ("simclr", "clip", "fixmatch"):
        trainer = trained(name, folder / name, hub_model_id=f"alice/{name}", hub_private_repo=name == "clip")
        trainer.train()
        with torch.no_grad():
            method = trainer.method.eval()
            found[name] = {"features": method.features(pixels(trainer.views)).tolist()}
            if name == "fixmatch":
                logits = method(pixels(trainer.views)).logits[0]
                found[name]["labels"] = dict(zip("abcd", logits.softmax(-1).tolist()))
            if name == "clip":
                words = method.text_features(**trainer.views.encode_text(TEXTS))
                sides = (torch.tensor(found[name]["features"]), words)
                image, text = (side / side.norm(dim=-1, keepdim=True) for side in sides)
                scores = (method.backbone.logit_scale.exp() * image @ text.T).softmax(-1)
                found[name]["zero_shot"] = [dict(zip(TEXTS, row)) for row in scores.tolist()]
        if name == "simclr":
            found["commit"] = trainer.push_to_hub(license="apache-2.0").oid
        elif name == "clip":
            method.push_to_hub("alice/clip", private=True)
        else:
            trainer.save_model(str(folder / name / "checkpoint-20"))
            found["exit"] = main(
                ["publish", str(folder / name / "checkpoint-20"), "alice/fixmatch", "--license", "mit"]
            )
    save_file(
        {"images": torch.stack([torch.from_numpy(p) for p in pictures(3, seed=11)])}, folder / "pictures.safetensors"
    )
    repos = {f"alice/{name}": TEXTS for name in ("simclr", "clip", "fixmatch")}
    run_plain(PLAIN, folder, hub, json.dumps(repos))
    found["plain"] = json.loads((folder / "plain.json").read_text())
    again = SimCLRForPreTraining.from_pretrained("alice/simclr")
    found["step"] = int(again.step)
    local = SimCLRForPreTraining.from_pretrained(folder / "simclr")
    state = trainer_state(folder / "simclr" / "ssl")
    for model in (again, local, load_method("alice/simclr")[0]):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert SimCLRImageProcessor.from_pretrained("alice/simclr").size == {"height": 16, "width": 16}
    found["files"] = {name: sorted(hub.store.files(f"alice/{name}")) for name in ("simclr", "clip", "fixmatch")}
    found["card"] = hub.store.files("alice/simclr")["README.md"].read_text()
    found["config"] = hub.store.files("alice/simclr")["config.json"].read_text()
    found["leaks"] = leaks(hub, folder)
    return found


def trainer_state(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def run_plain(code: str, folder: Path, hub: LoopbackHub, *argv: str) -> str:
    """Run code in a process with the Hub and without our checkout on its path."""
    environment = {**os.environ, **hub.environment(folder / "home-plain")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *argv], env=environment, cwd=folder, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def leaks(hub: LoopbackHub, folder: Path, *texts: str) -> list[str]:
    """Where a published file (of any commit) or one of the texts names this machine's folders, its name or a token."""
    import platform

    needles = [str(folder), str(ROOT), f"{Path.home()}/", platform.node(), "hf_alice", SECRET]
    pattern = re.compile(rb"(?<!\w)(" + b"|".join(re.escape(needle.encode()) for needle in needles) + rb")(?!\w)")
    found = [f"text: {match[1].decode()}" for text in texts for match in pattern.finditer(text.encode())]
    for _, repo in list(hub.store.repos):
        for commit in hub.store.history(repo):
            for path, blob in commit["files"].items():
                hits = {match[1].decode() for match in pattern.finditer(hub.store.blob(blob["sha"]).read_bytes())}
                if path.endswith((".safetensors", ".png")):  # a short name may stand in numbers by chance
                    hits = {hit for hit in hits if len(hit) > 8}
                found += [f"{repo}/{path}: {hit}" for hit in hits]
    return sorted(set(found))


# --- the card -------------------------------------------------------------------------------------------------------


def card(folder: Path, hub: LoopbackHub) -> dict[str, Any]:
    """A run of the command line, published at every save and at the end, then again after its card was edited."""
    from huggingface_hub import HfApi, ModelCard

    from hf_ssl.cli import main

    os.chdir(folder)
    photos(folder / "photos")
    command = ["train", "simclr", "--dataset", str(folder / "photos"), "--output_dir", "run", "--backbone"]
    command += ["resnet-pico", "--image_size", "16", "--max_steps", "4", "--per_device_train_batch_size", "8"]
    command += ["--projection_dim", "8", "--logging_steps", "2", "--save_steps", "2", "--use_cpu", "--push_to_hub"]
    command += ["--hub_strategy", "every_save", "--hub_model_id", "alice/card", "--run_name", SECRET, "--no_report"]
    command += ["--hub_always_push", "true"]  # else a slow machine leaves a save out while the last one is sent
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        found: dict[str, Any] = {"train": main(command)}
    found["commits"] = [commit["title"] for commit in hub.store.history("alice/card")]
    api, text = HfApi(), hub.store.files("alice/card")["README.md"].read_text()
    text = text.replace("tags:\n", "tags:\n- my-tag\n").replace("library_name", "language: en\nlibrary_name", 1)
    text = text.replace("---\n\n<!--", "---\n\nRead me first.\n\n<!--") + "\n## Mine\n\nI wrote this.\n"
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="alice/card")
    again = ["publish", "run", "alice/card", "--license", "cc-by-4.0"]
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        found["publish"] = [main([*again, "--pictures"]), main(again), main([*again, "--revision", "v2"])]
    found["card"] = hub.store.files("alice/card")["README.md"].read_text()
    found["branch"] = hub.store.files("alice/card", branch="v2")["README.md"].read_text()
    found["files"] = sorted(hub.store.files("alice/card"))
    found["history"] = [commit["title"] for commit in hub.store.history("alice/card")]
    ModelCard(found["card"]).validate()
    loaded = ModelCard.load("alice/card").data
    found["results"] = [{**vars(result)} for result in loaded.eval_results]
    found["data"] = loaded.to_dict()
    snippet = re.search(r"```python\n(.*?)```", found["card"], re.S)[1]
    found["snippet"] = run_plain(BLOCKED + snippet, folder, hub)
    log = log.getvalue().replace(str(folder / "photos"), "")  # what the user typed may be said back to them
    found["log"], found["leaks"] = log[-2000:], leaks(hub, folder, log, *checkpoint_texts(folder / "run"))
    return found


def photos(folder: Path) -> None:
    """Pictures of two classes, told apart by colour: 24 to train on, 12 to test."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise = np.clip(rng.integers(-40, 40, (20, 20, 3)) + colour, 0, 255).astype(np.uint8)
                Image.fromarray(noise).save(folder / split / name / f"{i}.png")


def checkpoint_texts(run: Path) -> list[str]:
    return [file.read_text() for file in run.glob("checkpoint-*/*.json")]


# --- what may go wrong ----------------------------------------------------------------------------------------------


def refused(folder: Path, hub: LoopbackHub) -> dict[str, Any]:
    """Every refusal and break-down of a push with its sentence; afterwards the same push works."""
    from hf_ssl.hub import load_method
    from hf_ssl.hub import publish as module
    from tests.contract.tiny import build, processor

    module._WAITS = (0.05, 0.05, 0.05)
    model, views = build("simclr"), processor("simclr")
    found: dict[str, Any] = {"sentences": {}, "worked": {}}

    def push(name: str, repo: str = REPO, fault: Any = None, **options: Any) -> None:
        hub.fault = fault or (lambda method, path: None)
        try:
            model.push_to_hub(repo, processor=views, **options)
            found["worked"][name] = True
        except OSError as error:
            found["sentences"][name] = str(error)
        finally:
            hub.fault = lambda method, path: None

    def always(answer: Any, part: str) -> Any:
        return lambda method, path: answer if part in path and method != "GET" else None

    def first(count: int, answer: Any, part: str) -> Any:
        seen = iter(range(count))
        return lambda method, path: answer if part in path and next(seen, None) is not None else None

    def meanwhile(method: str, path: str) -> None:
        if "/commit/" in path and len(hub.store.history(REPO)) == before:
            repo = hub.store.repos["models", REPO]
            head = repo["branches"]["main"]
            files = {**repo["commits"][head]["files"], "theirs.txt": hub.store.keep(b"theirs")}
            hub.store.commit(repo, "main", head, files, "by somebody else", "bob")

    push("wrong token", token="hf_nobody0000000000000")
    push("read-only token", token="hf_reader")
    push("another's namespace", "bob/tiny")
    push("no repo id", "alice/ti ny")
    push("server error", fault=always(500, "/commit/"))
    push("conflict", fault=always(409, "/commit/"))
    push("reset", fault=always("reset", "/commit/"))
    push("not found", fault=always(404, "/commit/"))
    push("too large", fault=always(413, "/commit/"))
    found["before"] = len(hub.store.history(REPO))
    push("busy twice", fault=first(2, 503, "/commit/"))
    push("reset once", fault=first(1, "reset", "/repos/create"))
    before = len(hub.store.history(REPO))
    model.step += 1  # a push without any change makes no commit
    push("somebody else meanwhile", fault=meanwhile)
    found["after"] = {"titles": [c["title"] for c in hub.store.history(REPO)], "files": sorted(hub.store.files(REPO))}
    hub.store.repos["models", REPO]["gated"] = "auto"
    found["load"] = {}
    for name, repo, token in (("gated", REPO, "hf_bob"), ("private", "alice/secret", "hf_bob")):
        if name == "private":
            push("private", repo, private=True)
        try:
            load_method(repo, token=token)
        except OSError as error:
            found["load"][name] = str(error)
    found["owner"] = int(load_method("alice/secret")[0].step)
    kept = [path for path in Path(tempfile.gettempdir()).glob("hf-ssl-*") if str(path) in json.dumps(found)]
    found["kept"] = len(kept)
    found["repeated"] = main_publish(kept[0], REPO)
    for path in kept:
        shutil.rmtree(path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        with mock.patch("os.fsync", side_effect=full):  # what is written goes to the disk
            module.write_checked(folder / "full", model, views, REPO, {})
    except OSError as error:
        found["sentences"]["disk full"] = str(error)
    return found


def main_publish(path: Path, repo: str) -> int:
    from hf_ssl.cli import main

    return main(["publish", str(path), repo])


def run(name: str, folder: Path) -> None:
    hub = LoopbackHub(folder / "hub")
    os.environ |= hub.environment(folder / "home")
    start = time.perf_counter()
    from tests.hub import interrupted, streaming

    found = {f.__name__: f for f in (publish, card, refused, streaming.stream, interrupted.killed)}[name](folder, hub)
    (folder / f"{name}.json").write_text(json.dumps({**found, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
