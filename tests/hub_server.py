"""A Hugging Face Hub on loopback: what huggingface_hub asks of the real one to push and to pull.

Only the server is ours; the client is huggingface_hub itself, pointed here. Commits are atomic and
kept, small files travel as base64, large ones through LFS, and faults can be asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets.config
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http, close_session

TOKEN = "token-of-me"
# Name and role of each token; `org` is an organisation that `me` may write to.
USERS = {TOKEN: ("me", "write"), "token-to-read": ("me", "read"), "token-of-eve": ("eve", "write")}
LICENSES = ("apache-2.0", "cc-by-4.0", "mit", "other")
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
_API = r"/api/(models|datasets|spaces)/([\w.-]+/[\w.-]+)"
_WEB = r"/(?:(datasets|spaces)/)?([\w.-]+/[\w.-]+)"


class RefusedError(Exception):
    """An answer that is an error: status, X-Error-Code and X-Error-Message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Repo:
    """One repository; `commits` holds (id, message, files by path) from the oldest."""

    private: bool = False
    lfs: set[str] = field(default_factory=set)
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        number = f"{len(self.commits)} {message}".encode()
        identity = hashlib.sha1(number + b"".join(sorted(files.values()))).hexdigest()
        self.commits.append((identity, message, files))
        return identity

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        for identity, _, files in reversed(self.commits):
            if revision in ("main", identity):
                return identity, files
        raise RefusedError(404, "RevisionNotFound", "no such revision")

    def oid(self, path: str, content: bytes) -> str:
        """SHA-256 of a large file, git's blob id of a small one."""
        if path in self.lfs:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path: str, revision: str) -> dict[str, Any]:
        """What the tree says of a file, or of a folder if there is no such file."""
        content = self.at(revision)[1].get(path)
        oid = hashlib.sha1(content or path.encode()).hexdigest()
        if content is None:
            return {"type": "directory", "path": path, "size": 0, "oid": oid}
        entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
        if path in self.lfs:
            large = {"oid": self.oid(path, content), "size": len(content), "pointerSize": 130}
            entry |= {"lfs": large}
        return entry


class Hub:
    """State of the server; `url` is where it listens."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[tuple[str, RefusedError]] = []
        self.drops = 0
        self.url = ""

    def fail(self, pattern: str, status: int, code: str = "", message: str = "") -> None:
        """Answer each request whose `METHOD path` matches with an error."""
        self.faults.append((pattern, RefusedError(status, code, message)))

    def drop_uploads(self, count: int) -> None:
        """Cut the connection in the middle of the next `count` uploads of large files."""
        self.drops = count

    def files(self, repo: str, kind: str = "models") -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.repos[kind, repo].at("main")[1]

    def messages(self, repo: str) -> list[str]:
        """Messages of all commits but the first, empty one."""
        return [message for _, message, _ in self.repos["models", repo].commits[1:]]


class Handler(BaseHTTPRequestHandler):
    """One request; the routes are at the end of the class."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing: tests look at stderr."""

    def _serve(self) -> None:
        address = urlsplit(self.path)
        self.path, self.query = unquote(address.path), parse_qs(address.query)
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.command == "PUT" and self.hub.drops:
            self.hub.drops -= 1
            self.rfile.read(1000)
            self.close_connection = True
            return
        body = self._body()
        try:
            self._route(body)
        except RefusedError as error:
            heads = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            named = {name: value for name, value in heads.items() if value}
            self._answer(json.dumps({"error": error.message}).encode(), error.status, named)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _route(self, body: bytes) -> None:
        here = f"{self.command} {self.path}"
        for pattern, error in self.hub.faults:
            if re.search(pattern, here):
                raise error
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, here):
                answer(self, body, *match.groups())
                return
        raise RefusedError(404, "", f"no route {here}")

    def _user(self, *, write: bool = False) -> tuple[str, str]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in USERS:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        name, role = USERS[token]
        if write and role != "write":
            raise RefusedError(403, "", "This token may only read")
        return name, role

    def _repo(self, kind: str | None, name: str, *, write: bool = False) -> Repo:
        repo = self.hub.repos.get((kind or "models", name))
        if repo is None:
            raise RefusedError(404, "RepoNotFound", "Repository not found")
        if write or repo.private:
            user, _ = self._user(write=write)
            if name.split("/")[0] not in _namespaces(user):
                status, code = (403, "") if write else (404, "RepoNotFound")
                raise RefusedError(status, code, "Not yours")
        return repo

    def whoami(self, _: bytes) -> None:
        name, role = self._user()
        orgs = [{"name": org} for org in _namespaces(name)[1:]]
        token = {"displayName": "test", "role": role}
        self._json({"type": "user", "name": name, "orgs": orgs, "auth": {"accessToken": token}})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        user, _ = self._user(write=True)
        owner = wanted.get("organization") or user
        if owner not in _namespaces(user):
            raise RefusedError(403, "", f"No right to create a model under {owner}")
        kind = wanted.get("type", "model") + "s"
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.hub.repos:
            self._json({"error": "You already created this repo", "url": url}, 409)
            return
        repo = self.hub.repos[kind, name] = Repo(wanted.get("visibility") == "private")
        repo.commit("initial commit", {})
        self._json({"url": url, "name": name})

    def validate_yaml(self, body: bytes) -> None:
        license_id = re.search(r"^license: (.*)$", json.loads(body)["content"], re.MULTILINE)
        known = license_id is not None and license_id[1] in LICENSES
        faults = [] if known else [{"message": '"license" must be one of a list'}]
        self._json({"errors": faults, "warnings": []}, 400 if faults else 200)

    def preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name, write=True)
        _, files = repo.at(revision)
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            large = path.endswith(LFS_SUFFIXES)
            oid = repo.oid(path, files[path]) if path in files else None
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, body: bytes, kind: str | None, name: str) -> None:
        self._repo(kind, name, write=True)
        answers = []
        for item in json.loads(body)["objects"]:
            if item["oid"] not in self.hub.objects:
                place = f"{self.hub.url}/lfs/{item['oid']}"
                links = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
                item |= {"actions": links}
            answers.append(item)
        self._json({"transfer": "basic", "objects": answers})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "", "content and id differ")
        self.hub.objects[oid] = body
        self._json({})

    def lfs_verify(self, body: bytes, oid: str) -> None:
        self._user(write=True)
        if len(self.hub.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise RefusedError(404, "", "not uploaded")
        self._json({})

    def commit(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name, write=True)
        files, message = dict(repo.at(revision)[1]), ""
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                repo.lfs.add(value["path"])
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise RefusedError(400, "", f"unknown operation {key}")
        identity = repo.commit(message, files)
        url = f"{self.hub.url}/{name}/commit/{identity}"
        self._json({"commitOid": identity, "commitUrl": url, "success": True})

    def info(self, _: bytes, kind: str, name: str, revision: str | None = None) -> None:
        repo = self._repo(kind, name)
        identity, files = repo.at(revision or "main")
        listed: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
        for entry in listed:
            if (path := entry["rfilename"]) in repo.lfs:
                size = len(files[path])
                sha = repo.oid(path, files[path])
                entry["lfs"] = {"size": size, "sha256": sha, "pointerSize": 130}
        about = {"id": name, "private": repo.private, "sha": identity, "siblings": listed}
        self._json({**about, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, _: bytes, kind: str, name: str, revision: str, under: str | None) -> None:
        repo = self._repo(kind, name)
        root = f"{under.strip('/')}/" if under else ""
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for path in sorted(repo.at(revision)[1]):
            first, *rest = path.removeprefix(root).split("/")
            if path.startswith(root):
                found = path if deep or not rest else root + first
                entries[found] = repo.entry(found, revision)
        if under and not entries:
            raise RefusedError(404, "EntryNotFound", "no such folder")
        self._json(list(entries.values()))

    def paths_info(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name)
        wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        known = repo.at(revision)[1]
        there = [p for p in wanted if p in known or any(k.startswith(f"{p}/") for k in known)]
        self._json([repo.entry(path, revision) for path in there])

    def check_write(self, _: bytes, kind: str, name: str) -> None:
        self._repo(kind, name, write=True)
        self._json({})

    def resolve(self, _: bytes, kind: str | None, name: str, revision: str, path: str) -> None:
        repo = self._repo(kind, name)
        identity, files = repo.at(revision)
        if path not in files:
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {"ETag": f'"{repo.oid(path, content)}"', "X-Repo-Commit": identity}
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._answer(content, status, headers)


ROUTES = (
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate_yaml),
    (rf"GET {_API}/auth-check/write", Handler.check_write),
    (rf"POST {_API}/preupload/([^/]+)", Handler.preupload),
    (rf"POST {_WEB}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(\w+)", Handler.lfs_put),
    (r"POST /lfs/(\w+)/verify", Handler.lfs_verify),
    (rf"POST {_API}/commit/([^/]+)", Handler.commit),
    (rf"POST {_API}/paths-info/([^/]+)", Handler.paths_info),
    (rf"GET {_API}/tree/([^/]+)(/.+)?", Handler.tree),
    (rf"GET {_API}(?:/revision/([^/]+))?", Handler.info),
    (rf"(?:GET|HEAD) {_WEB}/resolve/([^/]+)/(.+)", Handler.resolve),
)


def _namespaces(user: str) -> list[str]:
    return [user, "org"] if user == "me" else [user]


@contextmanager
def serving(cache: Path) -> Iterator[Hub]:
    """A Hub that answers, and huggingface_hub and datasets pointed at it, with empty caches.

    Args:
        cache: folder for what is downloaded.
    """
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            patch.setattr(constants, name, value)
        # huggingface_hub 1.21 has no such file.
        harnesses = str(cache / "harnesses.json")
        patch.setattr(constants, "AGENT_HARNESSES_PATH", harnesses, raising=False)
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        patch.setattr(
            datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/"
        )
        # huggingface_hub tries again after 1, 2, 4, 8 and 8 seconds; once is enough to see it.
        patch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None))
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("HF_TOKEN", TOKEN)
        close_session()
        try:
            yield hub
        finally:
            close_session()
            server.shutdown()
            server.server_close()
            thread.join()
