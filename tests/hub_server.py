"""A stand-in of the Hugging Face Hub on loopback: models in memory, for the real client to write to and read from, and
datasets to read.

One account, private repositories, branches, tags and commits, ranges, and faults on demand; no xet, redirects or pages.
Weights and tables are known by their SHA-256, as the Hub knows what is kept in LFS; uploads know no LFS.
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
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"
API = re.compile(
    r"/api/(?:models/|(?P<kind>datasets/))(?P<id>[^/]+/[^/]+?)/(?P<verb>revision|tree|preupload|commit|branch)"
    r"/(?P<rev>[^/]+)(?:/(?P<path>.+))?"
)
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/(?P<verb>resolve)/(?P<rev>[^/]+)/(?P<path>.+)")
WRITES = ("preupload", "commit", "branch")
LFS = (".safetensors", ".parquet")

Files = dict[str, bytes]


def git_id(content: bytes, kind: str = "blob") -> str:
    """What git calls an object."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def file_id(path: str, content: bytes) -> str:
    """What the Hub calls a file's content: the ETag, and so its name in the client's cache."""
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS) else git_id(content)


@dataclass
class Repo:
    """Commits by their id, and names of them."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, ref: str = "main") -> str:
        """Add a commit with these files (and no others) to a branch."""
        content = "".join(f"{path} {git_id(data)}\n" for path, data in sorted(files.items()))
        commit = git_id(f"{self.refs.get(ref, '')} {len(self.commits)}\n{content}".encode(), "commit")
        self.commits[commit], self.refs[ref] = dict(files), commit
        return commit

    def files(self, ref: str = "main") -> Files:
        """The files at a branch, tag or commit."""
        return self.commits[self.refs.get(ref, ref)]


@dataclass
class Faults:
    """What goes wrong, while it is set."""

    where: str = ""
    """Only requests whose path contains this have a fault."""
    times: int | None = None
    """After so many answers with a fault there is none any more."""
    status: int | None = None
    """Every answer has this status."""
    page: bool = False
    """Every answer is a web page, as in a hotel that wants a room number first."""
    cut_after: int | None = None
    """The connection drops after so many bytes of a file's body."""
    stall_s: float = 0.0
    """Every body pauses in its middle, or where it is cut."""
    short_by: int = 0
    """Files lack so many bytes at their end, and the server believes that this is all."""
    wrong_bytes: tuple[str, ...] = ()
    """These files come with one byte altered."""
    delay_s: float = 0.0
    """Every answer waits."""

    def strike(self, path: str, *, counts: bool = True) -> Faults:
        """The faults of one answer."""
        if self.where not in path or self.times == 0:
            return Faults()
        if counts and self.times is not None:
            self.times -= 1
        return self


class Refusal(Exception):
    """A status and the code by which the client chooses its exception."""

    def __init__(self, status: int, code: str = "", **content: Any) -> None:
        super().__init__(code)
        self.status, self.code, self.content = status, code, {"error": code, **content}


class HubServer(ThreadingHTTPServer):
    """Repositories by id (`owner/name`, `datasets/owner/name`), faults, and the requests: `METHOD path range`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.faults = Faults()
        self.requests: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may leave when it likes."""


class Handler(BaseHTTPRequestHandler):
    """Routes one request."""

    server: HubServer

    def do_GET(self) -> None:
        """Answer, or refuse in the Hub's words."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        part = self.headers.get("Range", "")
        self.server.requests.append(f"{self.command} {self.path} {part}".strip())
        faults = self.server.faults
        faults = faults.strike(self.path, counts=bool(faults.status or faults.page))
        threading.Event().wait(faults.delay_s)
        try:
            if faults.status:
                raise Refusal(faults.status)
            if faults.page:
                return self.send(b"<html>Welcome! Your room number?</html>", 200, {"Content-Type": "text/html"})
            self.route(urlsplit(self.path).path, body)
        except Refusal as refusal:
            self.send(json.dumps(refusal.content).encode(), refusal.status, {"X-Error-Code": refusal.code})

    do_HEAD = do_POST = do_GET

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        match = API.fullmatch(path) or RESOLVE.fullmatch(path)
        if match is None:
            raise Refusal(404, "NotFound")
        repo = self.server.repos.get((match["kind"] or "") + match["id"])
        verb, rev = match["verb"], unquote(match["rev"])
        if (verb in WRITES or (repo and repo.private)) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401)
        if repo is None:
            raise Refusal(404, "RepoNotFound")
        if verb == "branch":
            return self.branch(repo, rev)
        commit = repo.refs.get(rev, rev)
        if commit not in repo.commits:
            raise Refusal(404, "RevisionNotFound")
        if verb == "resolve":
            return self.send_file(repo, commit, unquote(match["path"]))
        if verb == "commit":
            return self.commit(match["id"], repo, rev, body)
        files = repo.commits[commit]
        if verb == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            known = {path: git_id(content) for path, content in files.items()}
            return self.send_json({"files": [{"path": path, "oid": known.get(path), **modes} for path in paths]})
        if verb == "tree":
            recursive = "recursive=false" not in urlsplit(self.path).query.lower()
            return self.send_json(tree_of(files, unquote(match["path"] or ""), recursive=recursive))
        self.send_json({"id": match["id"], "sha": commit, "siblings": [{"rfilename": path} for path in files]})

    def create(self, wanted: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401)
        repo_id = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        url = f"{self.server.endpoint}/{repo_id}"
        if repo_id in self.server.repos:
            raise Refusal(409, url=url)
        repo = self.server.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        repo.commit({".gitattributes": b""})
        self.send_json({"url": url})

    def branch(self, repo: Repo, name: str) -> None:
        if name in repo.refs:
            raise Refusal(409)
        repo.refs[name] = repo.refs["main"]
        self.send_json({})

    def commit(self, repo_id: str, repo: Repo, branch: str, body: bytes) -> None:
        files = dict(repo.files(branch))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = repo.commit(files, branch)
        self.send_json({"commitOid": commit, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{commit}"})

    def send_file(self, repo: Repo, commit: str, path: str) -> None:
        headers = {"X-Repo-Commit": commit}
        if path not in repo.commits[commit]:
            return self.send(b"{}", 404, {"X-Error-Code": "EntryNotFound", **headers})
        content = repo.commits[commit][path]
        headers |= {"ETag": f'"{file_id(path, content)}"', "Accept-Ranges": "bytes"}
        faults = self.server.faults.strike(self.path, counts=self.command == "GET")
        content = content[: len(content) - faults.short_by]
        if path in faults.wrong_bytes:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start, status = 0, 200
        if self.command == "GET" and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(content[start:], status, headers, cut_after=faults.cut_after, stall_s=faults.stall_s)

    def send_json(self, value: Any) -> None:
        self.send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def send(
        self, body: bytes, status: int, headers: dict[str, str], cut_after: int | None = None, stall_s: float = 0.0
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            first = cut_after if cut_after is not None else len(body) // 2
            self.wfile.write(body[:first])
            threading.Event().wait(stall_s)
            self.wfile.write(body[first:] if cut_after is None else b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal of the tests."""


def tree_of(files: Files, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below a folder, as the Hub lists them."""
    entries: list[dict[str, Any]] = []
    for path, content in files.items():
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
        lfs = {"oid": file_id(path, content), "size": len(content), "pointerSize": 134}
        entries.append(entry | ({"lfs": lfs} if path.endswith(LFS) else {}))
    folders = {parent.as_posix() for path in files for parent in PurePosixPath(path).parents} - {"."}
    entries += [{"type": "directory", "path": path, "oid": git_id(path.encode(), "tree")} for path in sorted(folders)]
    start = f"{folder}/" if folder else ""
    below = [entry for entry in entries if entry["path"].startswith(start)]
    if not below:
        raise Refusal(404, "EntryNotFound")
    return [entry for entry in below if recursive or "/" not in entry["path"].removeprefix(start)]


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server that is stopped at the end."""
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
