"""A hub on this machine: repositories in memory, behind the few addresses that huggingface_hub asks for models.

The client is the real one, so that its cache, its errors and its commits are what they are with the hub. As there, the
description of a gated repository is public and its files are not, and weights lie behind a redirect.
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
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """One repository; every commit is kept."""

    private: bool = False
    gated: bool = False
    broken: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str = "main", message: str = "") -> str:
        """Let a branch have these files."""
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid] = self.branches_files(branch) | files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def branches_files(self, branch: str) -> Files:
        """Files of a branch; none where it is not there."""
        return dict(self.commits.get(self.branches.get(branch, ""), {}))

    def found(self, revision: str) -> str | None:
        """The commit of a branch, or of itself."""
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class LocalHub:
    """What the server has, and what it was asked."""

    url: str = ""
    token: str = "hf_of_the_owner"
    """Of the account that may write, and read what is private or gated."""
    stranger: str = "hf_of_somebody_else"
    """Of an account that may do neither."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def add(self, name: str, folder: Path, branch: str = "main", **settings: Any) -> Repository:
        """A repository with the files of a folder, those of folders within it included."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        repository = self.repositories.setdefault(name, Repository(**settings))
        repository.commit(files, branch)
        return repository

    def files(self, name: str, branch: str = "main") -> Files:
        """What is in a repository now."""
        return self.repositories[name].branches_files(branch)

    def downloads(self) -> set[str]:
        """Names of the files that were asked for."""
        loaded = (path for path in self.asked if path.startswith("GET storage/") or re.match("GET .*/resolve/", path))
        return {path.rpartition("/")[2] for path in loaded}


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{method} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = path.split("/")
        match parts:
            case [""]:
                self._json({})
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "models", owner, name, *rest]:
                self._api(f"{owner}/{name}", rest)
            case [owner, name, "resolve", revision, *file]:
                self._resolve(f"{owner}/{name}", revision, "/".join(file))
            case ["storage", owner, name, commit, *file]:
                content = self.hub.repositories[f"{owner}/{name}"].commits[commit]["/".join(file)]
                self._answer(200, content, "application/octet-stream", {})
            case _:
                self._error(404, "RepoNotFound")

    @property
    def _owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    @property
    def _known(self) -> bool:
        return self._owner or self.headers.get("Authorization") == f"Bearer {self.hub.stranger}"

    def _create(self) -> None:
        if not self._owner:
            return self._error(401, "")
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self._json({"url": f"{self.hub.url}/{name}"}, 409)
        repository = Repository(private=asked.get("visibility") == "private")
        self.hub.repositories[name] = repository
        repository.commit({".gitattributes": b""}, message="initial commit")
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _readable(self, name: str) -> Repository | None:
        """The repository, if it may be read; else the answer is given."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._owner):
            self._error(404 if self._known else 401, "RepoNotFound")
            return None
        if repository.broken:
            self._error(500, "")
            return None
        return repository

    def _api(self, name: str, rest: list[str]) -> None:
        repository = self._readable(name)
        if repository is None:
            return None
        what, revision = [*rest, "main"][:2] if rest else ("revision", "main")
        if what == "branch":
            if not self._owner:
                return self._error(403, "")
            repository.branches.setdefault(revision, repository.branches["main"])
            return self._json({})
        commit = repository.found(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        files = repository.commits[commit]
        if what == "tree":
            sizes = {path: len(content) for path, content in files.items()}
            oid = "0" * 40
            return self._json([{"type": "file", "path": p, "size": s, "oid": oid} for p, s in sizes.items()])
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})
        if not self._owner:
            return self._error(403, "")
        if what == "preupload":
            asked = json.loads(self.body)["files"]
            return self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        return self._commit(repository, name, revision)

    def _commit(self, repository: Repository, name: str, branch: str) -> None:
        message, files, gone = "", {}, set()
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                gone.add(value["path"])
        oid = repository.commit(files, branch, message)
        for path in gone:
            del repository.commits[oid][path]
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._readable(name)
        if repository is None:
            return None
        if repository.gated and not self._owner:
            return self._error(403 if self._known else 401, "GatedRepo")
        commit = repository.found(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        content = repository.commits[commit].get(file)
        if content is None:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if file.endswith(".safetensors"):
            storage = self.hub.url.replace("127.0.0.1", "localhost")  # another machine to the client
            where = {"Location": f"{storage}/storage/{name}/{commit}/{file}", "X-Repo-Commit": commit}
            return self._answer(302, b"", "", where | {"X-Linked-ETag": etag, "X-Linked-Size": str(len(content))})
        return self._answer(200, content, "application/octet-stream", {"ETag": etag, "X-Repo-Commit": commit})

    def _json(self, data: Any, code: int = 200) -> None:
        self._answer(code, json.dumps(data).encode(), "application/json", {})

    def _error(self, code: int, kind: str, headers: dict[str, str] | None = None) -> None:
        self._answer(code, b"{}", "application/json", {"X-Error-Code": kind, **(headers or {})})

    def _answer(self, code: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A hub for as long as the block lasts."""
    hub = LocalHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
