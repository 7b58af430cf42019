"""A Hugging Face Hub on loopback for tests: the real client talks real HTTP to it, over private repos and faults.

Serves models and datasets: repos, refs, trees, LFS uploads, atomic commits, ranges, private and gated repos. Tokens:
hf_alice and hf_bob may write to their namespaces, hf_reader may read what alice may. ``python -m tests.hub_server
--port 8765 --root DIR`` runs one by hand; clients need HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET=1 set.
"""

import argparse
import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

from tests.hub_store import LFS, HubError, Store, git_oid

TOKENS = {"hf_alice": ("alice", "write"), "hf_bob": ("bob", "write"), "hf_reader": ("alice", "read")}
_REGULAR_MAX = 1 << 20  # larger files are LFS whatever their name
_CARD = re.compile(r"^---\r?\n(.*?)\r?\n---", re.S)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 20  # one packet per small answer: no 40 ms Nagle waits
    store: Store
    server: Any
    cut = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # --- plumbing -------------------------------------------------------------------------------------------------

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, status: int = 200, content: Any = None, headers: Any = (), data: bytes | None = None) -> None:
        data = json.dumps(content).encode() if data is None else data
        defaults = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(data))}
        self.send_response(status)
        for name, value in {**defaults, **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(data[: len(data) // 2] if self.cut else data)
        if self.cut:
            self.close_connection = True

    def handle_any(self) -> None:
        try:
            self.raw = self.body()
            if self._faulty(self.server.fault(self.command, self.path)):
                return
            path, _, query = self.path.partition("?")
            self.base = f"http://{self.headers.get('Host')}"
            self.query = {name: values[-1] for name, values in parse_qs(query).items()}
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
            if token and token not in TOKENS:
                raise HubError(401, "Invalid credentials in Authorization header")
            self.user, self.role = TOKENS.get(token, (None, None))
            for methods, pattern, answer in ROUTES:
                if self.command in methods and (match := pattern.fullmatch(path)):
                    with self.store.lock:
                        found = answer(self, **{k: unquote(v) if v else v for k, v in match.groupdict().items()})
                    return self.reply(*found)
            raise HubError(404, f"no route {self.command} {path}")
        except HubError as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            self.reply(error.status, {"error": error.message}, {"X-Error-Message": error.message, **code})
        except (ConnectionError, TimeoutError):  # the client was killed
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _faulty(self, fault: str | int | float | None) -> bool:
        """Do what the test asked for: a status, "reset" (no answer), "cut" (half of it), a wait of so many seconds."""
        if isinstance(fault, float):
            time.sleep(fault)
            return False
        self.cut = fault == "cut"
        if self.cut:
            return False
        if fault == "reset":
            self.close_connection = True
            self.connection.close()
            return True
        if fault is not None:
            self.reply(int(fault), {"error": f"fault {fault}"}, {"X-Error-Message": f"fault {fault}"})
        return fault is not None

    def repo(self, kind: str, repo_id: str, write: bool = False) -> dict:
        repo, owner = self.store.repos.get((kind, repo_id)), repo_id.split("/")[0]
        if repo is None or (repo["private"] and self.user != owner):  # the Hub hides what you may not see
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if repo["gated"] and self.user != owner and not write:
            raise HubError(403 if self.user else 401, f"Access to {repo_id} is restricted", "GatedRepo")
        if write:
            self.writer(owner)
        return repo

    def writer(self, owner: str | None) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if self.user != owner or self.role != "write":
            raise HubError(403, f"You don't have the rights to write to namespace {owner}")

    def link(self, kind: str, repo_id: str) -> str:
        return f"{self.base}/{'' if kind == 'models' else kind + '/'}{repo_id}"

    # --- account, repos, cards ------------------------------------------------------------------------------------

    def whoami(self) -> tuple:
        if not self.user:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "t", "role": self.role}
        about = {"id": self.user, "name": self.user, "fullname": self.user, "orgs": [], "isPro": False}
        return 200, {"type": "user", **about, "auth": {"type": "access_token", "accessToken": token}}

    def validate_yaml(self) -> tuple:
        found = _CARD.match(json.loads(self.raw)["content"])
        errors = []
        try:
            data = yaml.safe_load(found[1]) if found else None
            if not isinstance(data, dict):
                errors = ["empty or missing yaml metadata in repo card"]
            elif not all(isinstance(tag, str) for tag in data.get("tags", [])):
                errors = ["tags must be strings"]
        except yaml.YAMLError as error:
            errors = [f"bad YAML: {error}"]
        return (400 if errors else 200), {"errors": [{"message": text} for text in errors], "warnings": []}

    def create_repo(self) -> tuple:
        asked = json.loads(self.raw)
        kind, owner = (asked.get("type") or "model") + "s", asked.get("organization") or self.user
        self.writer(owner)
        repo_id = f"{owner}/{asked['name']}"
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        about = {"url": self.link(kind, repo_id), "name": repo_id, "id": repo_id}
        try:
            self.store.create(kind, repo_id, private, str(self.user))
        except HubError as error:
            return 409, {**about, "error": error.message}
        return 200, about

    def settings(self, kind: str, id: str) -> tuple:
        repo, asked = self.repo(kind, id, write=True), json.loads(self.raw)
        if "visibility" in asked or "private" in asked:
            repo["private"] = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo["gated"] = asked.get("gated", repo["gated"])
        return 200, asked

    def info(self, kind: str, id: str, rev: str | None = None) -> tuple:
        repo = self.repo(kind, id)
        commit = self.store.at(repo, rev or "main")
        card: dict = {}
        if readme := commit["files"].get("README.md"):
            found = _CARD.match(self.store.blob(readme["sha"]).read_text(errors="replace"))
            card = (yaml.safe_load(found[1]) if found else None) or {}
        files = [{"rfilename": path, "size": f["size"], "blobId": f["oid"]} for path, f in commit["files"].items()]
        dates = {"createdAt": min(c["date"] for c in repo["commits"].values()), "lastModified": commit["date"]}
        names = {"_id": id, "id": id, "modelId": id, "author": id.split("/")[0], "sha": commit["id"]}
        shown = {"tags": card.get("tags", []), "cardData": card, "pipeline_tag": card.get("pipeline_tag")}
        access = {"private": repo["private"], "gated": repo["gated"], "library_name": card.get("library_name")}
        return 200, {**names, **dates, **shown, **access, "downloads": 0, "likes": 0, "siblings": files}

    def auth_check(self, kind: str, id: str) -> tuple:
        self.repo(kind, id)
        return 200, {}

    # --- trees, refs, history -------------------------------------------------------------------------------------

    def nodes(self, commit: dict) -> dict[str, dict]:
        last = {name: commit[name] for name in ("id", "title", "date")}
        parents = {str(parent) for path in commit["files"] for parent in Path(path).parents if str(parent) != "."}
        found = {d: {"type": "directory", "path": d, "size": 0, "oid": git_oid(d.encode())} for d in parents}
        for path, f in commit["files"].items():
            found[path] = {"type": "file", "path": path, "oid": f["oid"], "size": f["size"], "lastCommit": last}
            found[path] |= {"lfs": f["lfs"]} if f["lfs"] else {}
        return found

    def tree(self, kind: str, id: str, rev: str, path: str | None = None) -> tuple:
        nodes = self.nodes(self.store.at(self.repo(kind, id), rev))
        path = (path or "").strip("/")
        if path and path not in nodes:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        prefix, deep = path + "/" if path else "", self.query.get("recursive", "").lower() in ("1", "true")
        inside = {name: node for name, node in sorted(nodes.items()) if name.startswith(prefix)}
        return 200, [node for name, node in inside.items() if deep or "/" not in name[len(prefix) :]]

    def paths_info(self, kind: str, id: str, rev: str) -> tuple:
        nodes = self.nodes(self.store.at(self.repo(kind, id), rev))
        as_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(self.raw)["paths"] if as_json else parse_qs(self.raw.decode()).get("paths", [])
        return 200, [nodes[path.strip("/")] for path in paths if path.strip("/") in nodes]

    def refs(self, kind: str, id: str) -> tuple:
        branches = self.repo(kind, id)["branches"].items()
        named = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        return 200, {"branches": named, "tags": [], "converts": [], "pullRequests": []}

    def commits(self, kind: str, id: str, rev: str) -> tuple:
        self.repo(kind, id)
        found = self.store.history(id, kind, rev)
        return 200, [{k: v for k, v in commit.items() if k not in ("files", "parent")} for commit in found]

    def branch(self, kind: str, id: str, name: str) -> tuple:
        repo = self.repo(kind, id, write=True)
        if name in repo["branches"]:
            raise HubError(409, f"Reference already exists: {name}")
        start = json.loads(self.raw or b"{}").get("startingPoint") or "main"
        repo["branches"][name] = self.store.at(repo, start)["id"]
        return 200, {}

    # --- writing: preupload -> LFS batch -> PUT -> commit ---------------------------------------------------------

    def preupload(self, kind: str, id: str, rev: str) -> tuple:
        files = self.store.at(self.repo(kind, id, write=True), rev)["files"]
        answers = []
        for asked in json.loads(self.raw)["files"]:
            path, old = asked["path"], files.get(asked["path"])
            lfs = path.endswith(LFS) or asked["size"] > _REGULAR_MAX or b"\0" in base64.b64decode(asked["sample"])
            known = {"oid": old["lfs"]["oid"] if old["lfs"] else old["oid"]} if old else {}
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known})
        return 200, {"files": answers}

    def lfs_batch(self, id: str, kind: str | None = None) -> tuple:
        kind, asked = kind or "models", json.loads(self.raw)
        self.repo(kind, id, write=True)
        objects = [{"oid": o["oid"], "size": o["size"]} for o in asked["objects"]]
        for item in objects:
            if not self.store.blob(item["oid"]).exists():
                put = {"href": f"{self.base}/_lfs/{item['oid']}/{self.store.sign(item['oid'])}", "header": {}}
                verify = {"href": f"{self.link(kind, id)}.git/info/lfs/verify", "header": {}}
                item["actions"] = {"upload": put, "verify": verify}
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def lfs_put(self, oid: str, sig: str) -> tuple:
        if self.store.signed.get(oid) != sig:
            raise HubError(403, "SignatureDoesNotMatch")
        if hashlib.sha256(self.raw).hexdigest() != oid:
            raise HubError(400, "XAmzContentSHA256Mismatch")
        self.store.blob(oid).write_bytes(self.raw)
        return 200, {}, {"ETag": f'"{oid}"'}

    def lfs_verify(self, id: str, kind: str | None = None) -> tuple:
        asked = json.loads(self.raw)
        path = self.store.blob(asked["oid"])
        whole = path.exists() and path.stat().st_size == asked["size"]
        return (200, {}) if whole else (404, {"message": "object not found"})

    def commit(self, kind: str, id: str, rev: str) -> tuple:
        repo = self.repo(kind, id, write=True)
        if rev not in repo["branches"]:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.raw.splitlines() if line.strip()]
        head, base = next(line["value"] for line in lines if line["key"] == "header"), repo["branches"][rev]
        if head.get("parentCommit") and not base.startswith(head["parentCommit"]):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo["commits"][base]["files"])
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                files[value["path"]] = self.store.keep(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not self.store.blob(value["oid"]).exists():
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.store.pointer(value["oid"])
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
        oid = self.store.commit(repo, rev, base, files, head["summary"], str(self.user))
        return 200, {"success": True, "commitUrl": f"{self.link(kind, id)}/commit/{oid}", "commitOid": oid}

    # --- reading --------------------------------------------------------------------------------------------------

    def resolve(self, id: str, rev: str, path: str, kind: str | None = None) -> tuple:
        commit = self.store.at(self.repo(kind or "models", id), rev)
        f, common = commit["files"].get(path), {"X-Repo-Commit": commit["id"], "Accept-Ranges": "bytes"}
        if f is None:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, {"error": "Entry not found"}, {**common, **missing}
        if f["lfs"]:
            common |= {"X-Linked-Etag": f'"{f["sha"]}"', "X-Linked-Size": str(f["size"])}
            if self.command == "GET":  # on HEAD the client would follow a redirect to the same host
                return 302, {}, {**common, "Location": f"{self.base}/_lfs/{f['sha']}/{self.store.sign(f['sha'])}"}
        return self.blob(f["sha"], {**common, "ETag": f'"{f["oid"]}"'})

    def lfs_get(self, oid: str, sig: str) -> tuple:
        if self.store.signed.get(oid) != sig:
            raise HubError(403, "SignatureDoesNotMatch")
        return self.blob(oid, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def blob(self, sha: str, headers: dict) -> tuple:
        path = self.store.blob(sha)
        size, status = path.stat().st_size, 200
        start, end = 0, size - 1
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            start = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
            end = min(int(asked[2] or size - 1), size - 1) if asked[1] else size - 1
            if start >= size:
                return 416, {}, {"Content-Range": f"bytes */{size}"}
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"}
        headers = {**headers, "Content-Length": str(end - start + 1), "Content-Type": "application/octet-stream"}
        with path.open("rb") as file:
            file.seek(start)
            return status, None, headers, file.read(end - start + 1) if self.command == "GET" else b""

    def nothing(self, **names: str) -> tuple:
        return 200, {}


_GET, _POST, _PUT = ("GET", "HEAD"), ("POST",), ("PUT",)
_API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
_WEB = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+?)"
_REV, _FILE, _SIGNED = r"(?P<rev>[^/]+)", r"(?P<path>.+)", r"/_lfs/(?P<oid>[0-9a-f]{64})/(?P<sig>[0-9a-f]+)"
ROUTES: list[tuple[tuple[str, ...], re.Pattern, Callable[..., tuple]]] = [
    (methods, re.compile(pattern), answer)
    for methods, pattern, answer in (
        (_GET, "/api/whoami-v2", Handler.whoami),
        (_POST, "/api/validate-yaml", Handler.validate_yaml),
        (_POST, "/api/repos/create", Handler.create_repo),
        (_PUT, f"{_API}/settings", Handler.settings),
        (_GET, _API, Handler.info),
        (_GET, f"{_API}/revision/{_REV}", Handler.info),
        (_GET, f"{_API}/auth-check", Handler.auth_check),
        (_GET, f"{_API}/tree/{_REV}(?:/{_FILE})?", Handler.tree),
        (_POST, f"{_API}/paths-info/{_REV}", Handler.paths_info),
        (_GET, f"{_API}/refs", Handler.refs),
        (_GET, f"{_API}/commits/{_REV}", Handler.commits),
        (_POST, f"{_API}/branch/(?P<name>[^/]+)", Handler.branch),
        (_POST, f"{_API}/preupload/{_REV}", Handler.preupload),
        (_POST, f"{_API}/commit/{_REV}", Handler.commit),
        (_POST, f"{_WEB}\\.git/info/lfs/objects/batch", Handler.lfs_batch),
        (_POST, f"{_WEB}\\.git/info/lfs/verify", Handler.lfs_verify),
        (_PUT, _SIGNED, Handler.lfs_put),
        (_GET, _SIGNED, Handler.lfs_get),
        (_GET, f"{_WEB}/resolve/{_REV}/{_FILE}", Handler.resolve),
        (_GET + _POST, "/api/telemetry/.*", Handler.nothing),
    )
]


class LoopbackHub:
    """A running server. ``fault(method, path)`` may return a status, "reset", "cut", seconds (a float), or None."""

    def __init__(self, root: str | Path, port: int = 0):
        self.store = Store(root)
        handler = type("BoundHandler", (Handler,), {"store": self.store})
        self._server: Any = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.fault = lambda method, path: None
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def fault(self) -> Callable[[str, str], Any]:
        return self._server.fault

    @fault.setter
    def fault(self, fault: Callable[[str, str], Any]) -> None:
        self._server.fault = fault

    def environment(self, home: str | Path, token: str | None = "hf_alice") -> dict[str, str]:
        """What a client process needs to talk to this Hub and to no other, with a cache of its own."""
        found = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        return found | ({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default="hub")
    parser.add_argument("--port", type=int, default=8765)
    asked = parser.parse_args()
    print("serving", LoopbackHub(asked.root, asked.port).url, flush=True)
    threading.Event().wait()
