"""What the loopback Hub keeps: repos, their commits, and the blobs on disk."""

import hashlib
import json
import re
import secrets
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

LFS = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".npz", ".tar", ".zip", ".gz", ".png", ".jpg")


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Store:
    """Repos = branches -> commits -> {path: blob}; blobs lie on disk under their sha256."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        self.repos: dict[tuple[str, str], dict] = {}
        self.signed: dict[str, str] = {}
        self.lock = threading.RLock()

    def blob(self, sha: str) -> Path:
        return self.root / "blobs" / sha

    def keep(self, data: bytes) -> dict:
        sha = hashlib.sha256(data).hexdigest()
        self.blob(sha).write_bytes(data)
        return {"oid": git_oid(data), "size": len(data), "sha": sha, "lfs": None}

    def pointer(self, sha: str) -> dict:
        size = self.blob(sha).stat().st_size
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n".encode()
        lfs = {"oid": sha, "size": size, "pointerSize": len(text)}
        return {"oid": git_oid(text), "size": size, "sha": sha, "lfs": lfs}

    def sign(self, oid: str) -> str:
        """Stands in for a presigned storage URL, which needs no Authorization."""
        return self.signed.setdefault(oid, secrets.token_hex(8))

    def commit(self, repo: dict, branch: str, parent: str | None, files: dict, title: str, author: str) -> str:
        seed = [branch, parent, sorted((path, f["oid"]) for path, f in files.items()), title, time.time_ns()]
        oid = hashlib.sha1(json.dumps(seed).encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        about = {"id": oid, "title": title, "message": "", "date": date, "authors": [{"user": author}]}
        repo["commits"][oid] = {**about, "parent": parent, "files": files}
        repo["branches"][branch] = oid
        return oid

    def create(self, kind: str, repo_id: str, private: bool, author: str) -> dict:
        if (kind, repo_id) in self.repos:
            raise HubError(409, "You already created this repo")
        repo = {"id": repo_id, "private": private, "gated": False, "commits": {}, "branches": {}}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS).encode()
        self.commit(repo, "main", None, {".gitattributes": self.keep(attributes)}, "initial commit", author)
        self.repos[kind, repo_id] = repo
        return repo

    def at(self, repo: dict, revision: str) -> dict:
        """The commit that a branch's name or a full or shortened hash means."""
        oid = repo["branches"].get(revision)
        if oid is None and re.fullmatch(r"[0-9a-f]{5,40}", revision):
            oid = next((found for found in repo["commits"] if found.startswith(revision)), None)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo["commits"][oid]

    def history(self, repo_id: str, kind: str = "models", branch: str = "main") -> list[dict]:
        """The commits of a branch, newest first, for tests to look at."""
        repo = self.repos[kind, repo_id]
        found, oid = [], repo["branches"][branch]
        while oid:
            found.append(repo["commits"][oid])
            oid = repo["commits"][oid]["parent"]
        return found

    def files(self, repo_id: str, kind: str = "models", branch: str = "main") -> dict[str, Path]:
        """Path in the repo -> file on disk, of the newest commit."""
        newest = self.history(repo_id, kind, branch)[0]["files"]
        return {path: self.blob(f["sha"]) for path, f in sorted(newest.items())}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
