"""``hf-ssl publish``: a run, or a checkpoint of one, as a repo on the Hub that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .console import UsageError, quiet, say
from .fields import Flag
from .flags import Parsed
from .runfolder import existing, read_run

FLAGS = (
    Flag("private", ("bool",), False, "Make the repo private, if it is not there yet."),
    Flag("revision", ("str",), None, "Branch to commit to, made if it is not there; default: main.", optional=True),
    Flag("license", ("str",), None, "Licence of the weights for the card, e.g. apache-2.0.", optional=True),
    Flag("message", ("str",), "Publish with hf_ssl", "Message of the commit."),
    Flag(
        "pictures", ("bool",), None, "Show test pictures on the card, with neighbours; default: only built-in ones.",
        optional=True,
    ),
)  # fmt: skip


def publish(parsed: Parsed) -> int:
    """RUN REPO: check the run folder, then push it in one commit."""
    if len(parsed.words) != 2:
        raise UsageError("publish: give RUN (a run folder or a checkpoint) and REPO (user/name).")
    path, repo_id = existing(parsed.words[0], "publish"), parsed.words[1]
    values = {flag.name: parsed.values.get(flag.name, flag.default) for flag in FLAGS}
    quiet()
    run = read_run(path)
    if values["license"]:
        run["license"] = values["license"]
    options = {"private": values["private"] or None, "revision": values["revision"], "message": values["message"]}
    say(f"published  {push(path, repo_id, run, values['pictures'], **options)}")
    return 0


def push(path: Path, repo_id: str, run: dict[str, Any], pictures: bool | None = None, **options: Any) -> str:
    """Draw the card's pictures where they may be shown, publish; the repo's address."""
    from ..hub import draw_pictures, publish_run
    from ..hub.pictures import may_show

    if (path / "run.json").is_file() and (may_show(run) if pictures is None else pictures):
        draw_pictures(path)
    return publish_run(path, repo_id, run, **options).repo_url.url
