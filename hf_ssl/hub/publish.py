"""Publishing: a complete local copy, a parity check, then one commit. A failure is reported in one sentence.

A commit is atomic: whatever breaks, the repo shows its earlier state or the new one, whole. A push may be repeated.
"""

import contextlib
import logging
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError

from ..files import whole_file
from ..modeling import SSLModel
from ..processing import SSLImageProcessor
from .card import merged, model_card
from .errors import explain, is_transient, status
from .folder import FOLDER, PICTURES, README, check_parity, export, files, load_method, pictures_in, publishable
from .results import is_hub_id

logger = logging.getLogger("hf_ssl.hub")

_WAITS = (1.0, 3.0, 9.0)  # seconds before each repetition of what a connection or a busy server broke
# What an earlier push may have left of our own making: it goes where the new one does not write it.
_STALE = ("model*.safetensors", "model.safetensors.index.json", "ssl/*", "labeled_rows.json")
Result = TypeVar("Result")


def publish_run(path: str | Path, repo_id: str, run: Mapping[str, Any] | None = None, **options: Any) -> CommitInfo:
    """Publish a run folder or a checkpoint. ``run``: what the card says of it, as run.json has it.

    options: private, revision (a branch, made if it is not there), token, message. Raises PublishError (then nothing,
    or the whole, is on the Hub), ParityError, FileNotFoundError without a method.
    """
    path = Path(path).expanduser()
    model, processor = load_method(path)
    options["again"] = push_command(path, repo_id)
    if (path / FOLDER).is_dir() and (path / "config.json").is_file():
        check_parity(path, model, processor)
        return send(path, model, repo_id, run, **options)
    with staging(path.parent) as folder:  # a checkpoint: its root is the method, not the native model
        write_checked(folder, model, processor, repo_id, run, options["again"])
        return send(folder, model, repo_id, run, **options)


def push_model(
    model: SSLModel,
    processor: SSLImageProcessor | None = None,
    *,
    repo_id: str,
    run: Mapping[str, Any] | None = None,
    commit_message: str = "Publish with hf_ssl",
    **options: Any,
) -> CommitInfo:
    """Publish a method that is in memory; options as ``publish_run``. Where it fails, the local copy is kept."""
    processor = processor or model.processor
    if processor is None:
        raise ValueError(
            f"this {type(model).__name__} does not know the image processor it was trained with: "
            "push_to_hub(..., processor=...)"
        )
    folder = Path(tempfile.mkdtemp(prefix="hf-ssl-"))
    options |= {"message": commit_message, "again": push_command(folder, repo_id)}
    try:
        write_checked(folder, model, processor, repo_id, run)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    done = send(folder, model, repo_id, run, **options)
    shutil.rmtree(folder, ignore_errors=True)
    return done


def push_command(path: Path, repo_id: str) -> str:
    """The command that repeats a push."""
    return shlex.join(["hf-ssl", "publish", str(path), repo_id])


def write_checked(
    path: Path,
    model: SSLModel,
    processor: SSLImageProcessor,
    repo_id: str,
    run: Mapping[str, Any] | None,
    again: str | None = None,
) -> None:
    """The complete local copy, and the proof that its root is the trained model. Raises PublishError, ParityError."""
    try:
        export(model, processor, path, dict(run or {}))
    except (OSError, SafetensorError) as error:
        raise explain(error, repo_id, again) from error
    check_parity(path, model, processor)


def send(
    path: Path,
    model: SSLModel,
    repo_id: str,
    run: Mapping[str, Any] | None = None,
    *,
    token: str | None = None,
    private: bool | None = None,
    again: str | None = None,
    **options: Any,
) -> CommitInfo:
    """Make the repo and the card, then ``upload``: for a folder that is complete and checked."""
    repo_id = create_repo(repo_id, token, private, again)
    return upload(path, card_for(path, model, repo_id, run, token), repo_id, token=token, again=again, **options)


@contextlib.contextmanager
def staging(beside: Path) -> Iterator[Path]:
    """A folder for one push, beside the run where that can be written to; gone afterwards, whatever happens."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".publish-", dir=beside))
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="hf-ssl-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def create_repo(repo_id: str, token: str | None = None, private: bool | None = None, again: str | None = None) -> str:
    """Make the repo unless it is there; its full id. Raises PublishError."""
    api = HfApi(token=token)
    try:
        return _steadily(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    except Exception as error:
        raise explain(error, repo_id, again) from error


def card_for(
    path: str | Path, model: SSLModel, repo_id: str, run: Mapping[str, Any] | None, token: str | None = None
) -> ModelCard:
    """The card of a folder for ``repo_id``: with its pictures, and the licences as the Hub states them."""
    facts = _with_licences(dict(run or {}), HfApi(token=token))
    return model_card(model, facts, repo_id, pictures_in(path))


def upload(
    path: str | Path,
    card: ModelCard,
    repo_id: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Publish with hf_ssl",
    again: str | None = None,
    extra: Mapping[str, Path] | None = None,
) -> CommitInfo:
    """One commit of the folder ``path`` (as ``export`` wrote it) with ``card``, into a repo that is there.

    extra: further files by their path in the repo. again: the command that repeats the push, for messages. What users
    wrote into the card that is in the repo, or in ``path``, stays. Raises PublishError.
    """
    path, api = Path(path), HfApi(token=token)
    try:
        for attempt in range(len(_WAITS) + 1):
            try:
                return _steadily(lambda: _commit(api, path, repo_id, card, revision, message, extra or {}))
            except Exception as error:
                if status(error) not in (409, 412) or attempt == len(_WAITS):
                    raise
                time.sleep(_WAITS[attempt])  # somebody else committed in between: take their state and go again
        raise AssertionError("the last attempt returns or raises")
    except Exception as error:
        raise explain(error, repo_id, again) from error


def _commit(
    api: HfApi,
    path: Path,
    repo_id: str,
    card: ModelCard,
    revision: str | None,
    message: str,
    extra: Mapping[str, Path],
) -> CommitInfo:
    """What the repo holds now, then the commit on top of exactly that."""
    head = _head(api, repo_id, revision)
    there = {sibling.rfilename for sibling in head.siblings or []}
    readme = path / README
    earlier = [_text(api, repo_id, head.sha)] if README in there else []
    earlier += [readme.read_text(encoding="utf-8")] if readme.is_file() else []
    text = str(merged(ModelCard(str(card)), *earlier))
    operations: list[Any] = [CommitOperationAdd(README, text.encode())]
    added = {**files(path), **extra}
    operations += [CommitOperationAdd(name, publishable(file)) for name, file in added.items()]
    stale = [*_STALE, *(f"{name.split('/')[0]}/*" for name in extra)]
    stale += [f"{PICTURES}/*"] if any(name.startswith(f"{PICTURES}/") for name in added) else []
    gone = [name for name in there - set(added) if any(fnmatch(name, pattern) for pattern in stale)]
    operations += [CommitOperationDelete(name) for name in sorted(gone)]
    done = api.create_commit(
        repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha, num_threads=2
    )
    with whole_file(readme) as file:
        file.write_text(text, encoding="utf-8")
    return done


def _head(api: HfApi, repo_id: str, revision: str | None) -> Any:
    try:
        return api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        return api.model_info(repo_id, revision=revision)


def _text(api: HfApi, repo_id: str, sha: str | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = api.hf_hub_download(repo_id, README, revision=sha, local_dir=folder)
        except EntryNotFoundError:
            return ""
        return Path(found).read_text(encoding="utf-8")


def _with_licences(run: dict[str, Any], api: HfApi) -> dict[str, Any]:
    """``run`` with the licences that the Hub states for its dataset and its base model, where it can be asked."""
    found = dict(run.get("licences") or {})
    asked: dict[str, tuple[Any, Callable]] = {
        "dataset": (str(run.get("dataset") or "").partition(":")[0], api.dataset_info),
        "base_model": ((run.get("init") or {}).get("from_pretrained"), api.model_info),
    }
    for kind, (name, info) in asked.items():
        if kind in found or not is_hub_id(name):
            continue
        try:
            data = info(name).card_data
            licence = data.get("license") if data else None
        except Exception as error:  # the card then says that it is not known
            logger.info("The licence of %s could not be asked for: %s", name, type(error).__name__)
            continue
        if licence:
            found[kind] = f"{licence} ({name})"
    return {**run, "licences": found}


def _steadily(call: Callable[[], Result]) -> Result:
    """``call()``, again after a while where the connection or a busy server broke it."""
    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            logger.info("The Hub did not answer as it should (%s); again in %g s.", type(error).__name__, wait)
            time.sleep(wait)
    return call()
