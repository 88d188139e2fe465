"""A small Hugging Face Hub on loopback: the HTTP that `huggingface_hub` speaks to make, fill and read a repository.

It keeps commits, each a whole tree, and branches, each the name of a commit. Large files are uploaded apart from
commits, as on the Hub. `faults` make it fail on purpose.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OWNER, TOKEN, READER = "tester", "hf_writes", "hf_reads"
_LARGE = (".safetensors", ".png", ".jpg", ".model")


@dataclass
class Fault:
    """Requests that fail: the next `times` whose method and path match.

    A status answers with it and `headers`; `cut` breaks the connection after that many bytes of the body were read.
    """

    method: str
    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    times: int = 10**6


@dataclass
class Repo:
    """One repository."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)

    def commit(self, tree: dict[str, bytes], branch: str | None) -> str:
        content = json.dumps([sorted((path, _sha(data)) for path, data in tree.items()), len(self.commits)])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = tree
        if branch is None:
            self.pulls.append(oid)
        else:
            self.branches[branch] = oid
        return oid

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


class Hub(ThreadingHTTPServer):
    """The server; `with running_hub() as hub` starts one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.mistakes: list[Any] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def create(self, name: str, *, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit({".gitattributes": b"", "README.md": b""} if name.startswith("old/") else {}, "main")
        return repo

    def publish(self, name: str, files: dict[str, bytes]) -> str:
        """Commit these files to a repository as another user, and return the commit."""
        return (self.repos.get(name) or self.create(name)).commit(dict(files), "main")

    def head(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.commits[repo.branches[branch]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep mistakes of this server; connections that are cut on purpose, or by a killed client, are none."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, ValueError)):
            self.mistakes.append(error)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
        assert not hub.mistakes, hub.mistakes


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        with self.server.lock:
            fault = next(
                (f for f in self.server.faults if f.times and f.method == self.command and re.search(f.path, path)),
                None,
            )
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.cut:
            self.rfile.read(min(fault.cut, length))
            # Closed with a reset, as a cable that is pulled.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(length)
        if fault is not None:
            self._reply(fault.status, {"error": "on purpose"}, fault.headers)
            return
        for pattern, act in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                act(self, body, *(unquote(group) for group in match.groups() if group is not None))
                return
        self._reply(404, {"error": "no such place"})

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _reply(self, status: int, answer: Any = None, headers: dict[str, str] | None = None) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self) -> bool:
        if self._token() == TOKEN:
            return True
        status = 403 if self._token() == READER else 401
        self._reply(
            status, {"error": "You don't have the rights" if status == 403 else "Invalid username or password."}
        )
        return False

    def _repo(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self._token() not in (TOKEN, READER)):
            status = 404 if self._token() else 401
            self._reply(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _tree(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        found = repo.tree(revision)
        if found is None:
            self._reply(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return found

    def whoami(self, body: bytes) -> None:
        if self._token() in (TOKEN, READER):
            role = "write" if self._token() == TOKEN else "read"
            self._reply(200, {"name": OWNER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}})
        else:
            self._reply(401, {"error": "Invalid credentials in Authorization header"})

    def create(self, body: bytes) -> None:
        if not self._may_write():
            return
        options = json.loads(body)
        name = f"{options.get('organization') or OWNER}/{options['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            self._reply(409, url | {"error": "You already created this model repo"})
            return
        self.server.create(name, private=bool(options.get("private")) or options.get("visibility") == "private")
        self._reply(200, url)

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        found = self._tree(name, revision)
        if found is not None:
            oid, tree = found
            siblings = [{"rfilename": path} for path in sorted(tree)]
            self._reply(
                200,
                {
                    "id": name,
                    "modelId": name,
                    "sha": oid,
                    "private": self.server.repos[name].private,
                    "siblings": siblings,
                    "tags": [],
                },
            )

    def tree(self, body: bytes, name: str, revision: str, below: str = "") -> None:
        found = self._tree(name, revision)
        if found is not None:
            inside = {path: data for path, data in found[1].items() if f"/{path}".startswith(f"{below.rstrip('/')}/")}
            if below and not inside:
                self._reply(404, {"error": f"{below} does not exist"}, {"X-Error-Code": "EntryNotFound"})
                return
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
                | ({"lfs": {"oid": _sha(data), "size": len(data), "pointerSize": 130}} if path.endswith(_LARGE) else {})
                for path, data in sorted(inside.items())
            ]
            self._reply(200, listed)

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if self._may_write() and (repo := self._repo(name)) is not None:
            if branch in repo.branches:
                self._reply(409, {"error": "Reference already exists"})
                return
            repo.branches[branch] = repo.branches["main"]
            self._reply(200, {})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._may_write() and (found := self._tree(name, revision)) is not None:
            files = []
            for file in json.loads(body)["files"]:
                data = found[1].get(file["path"])
                large = file["path"].endswith(_LARGE)
                oid = None if data is None else _sha(data) if large else _blob_id(data)
                files.append(
                    {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                    | ({} if oid is None else {"oid": oid})
                )
            self._reply(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if not self._may_write():
            return
        objects = []
        for file in json.loads(body)["objects"]:
            entry = {"oid": file["oid"], "size": file["size"]}
            if file["oid"] not in self.server.large:
                entry["actions"] = {
                    "upload": {"href": f"{self.server.url}/large/{file['oid']}", "header": {}},
                    "verify": {"href": f"{self.server.url}/verify", "header": {}},
                }
            objects.append(entry)
        self._reply(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if _sha(body) != oid:
            self._reply(400, {"error": "content does not match its name"})
            return
        self.server.large[oid] = body
        self._reply(200, {})

    def verify(self, body: bytes) -> None:
        file = json.loads(body)
        arrived = len(self.server.large.get(file["oid"], b"")) == file["size"]
        self._reply(200 if arrived else 404, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not self._may_write() or (found := self._tree(name, revision)) is None:
            return
        repo, (head, tree) = self.server.repos[name], found
        after = dict(tree)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", head) != head:
                self._reply(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            if line["key"] == "file":
                after[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.large:
                    self._reply(400, {"error": f"{value['path']} was never uploaded"})
                    return
                after[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del after[value["path"]]
        proposed = parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]
        oid = repo.commit(after, None if proposed else revision)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}
        self._reply(200, answer | {"pullRequestUrl": f"{self.server.url}/{name}/discussions/1"} if proposed else answer)

    def validate(self, body: bytes) -> None:
        good = json.loads(body)["content"].startswith("---\n")
        errors = [] if good else [{"message": "metadata is missing"}]
        self._reply(200 if good else 400, {"errors": errors, "warnings": []})

    def discussions(self, body: bytes, name: str) -> None:
        self._reply(200, {"discussions": [], "count": 0, "start": 0})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self._tree(name, revision)
        if found is None:
            return
        oid, tree = found
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if path not in tree:
            self._reply(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        data = tree[path]
        etag = _sha(data) if path.endswith(_LARGE) else _blob_id(data)
        headers |= {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._reply(206, data[first : last + 1], headers)
            return
        self._reply(200, data, headers)


_NAME = r"([^/]+/[^/]+)"
_ROUTES = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_NAME}", _Handler.info),
    (rf"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    (rf"/api/models/{_NAME}/tree/([^/]+)(/.*)?", _Handler.tree),
    (rf"/api/models/{_NAME}/branch/([^/]+)", _Handler.branch),
    (rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    (rf"/api/models/{_NAME}/discussions", _Handler.discussions),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/large/([0-9a-f]{64})", _Handler.put),
    (r"/verify", _Handler.verify),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
