"""A Hugging Face hub on 127.0.0.1: models and data sets out of folders, one commit each; models can be pushed."""

import base64
import functools
import hashlib
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

LARGE = (".parquet", ".safetensors", ".gz", ".gguf")
"""The hub keeps these as LFS files, whose ETag is their SHA-256 and not their git blob id."""

RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
PUSH = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
DATE = "2026-01-01T00:00:00.000Z"


class Hub(ThreadingHTTPServer):
    """Serves `root/models/OWNER/NAME/...` and `root/datasets/OWNER/NAME/...` at `url`: `with Hub(root) as hub`.

    A client reads HF_ENDPOINT when huggingface_hub is imported, so it belongs into a subprocess's environment.
    `log` has a line per answer. While `fault` is set, every answer is that: an HTTP status, "slow" (nothing for
    `slow_seconds`), or "cut" (the connection ends in the middle); a client switches with GET /fault/NAME.

    What a client with a token pushes is in `root/models` after its commit. `private` names the repositories that were
    created so. After `uploads_left` large files the connection ends in the middle of the next one.
    """

    slow_seconds = 12.0

    daemon_threads = True

    def __init__(self, root: Path | str) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.root = Path(root)
        self.log: list[str] = []
        self.fault = ""
        self.private: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self.uploads_left = 10**9
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def commit(self, kind: str, name: str) -> str:
        """The only commit of a repository; `kind` is "models" or "datasets"."""
        return Repository(kind, name, self.root / kind / name).commit


@dataclass(frozen=True)
class Repository:
    """A folder that is served; its commit is a hash over the names and contents of its files."""

    kind: str
    name: str
    folder: Path

    @property
    def files(self) -> dict[str, Path]:
        """All files by their names in the repository."""
        return {str(each.relative_to(self.folder)): each for each in sorted(self.folder.rglob("*")) if each.is_file()}

    @property
    def commit(self) -> str:
        """40 hexadecimal digits."""
        digest = hashlib.sha1(self.name.encode())
        for name, path in self.files.items():
            digest.update(f"{name} {_content(path).sha256}\n".encode())
        return digest.hexdigest()

    def has(self, revision: str) -> bool:
        """True if `revision` is the main branch or its commit."""
        return revision in ("main", self.commit)

    def info(self) -> dict[str, Any]:
        """What the hub tells of a repository."""
        return {
            "_id": hashlib.sha256(self.name.encode()).hexdigest()[:24],
            "id": self.name,
            "modelId": self.name,
            "sha": self.commit,
            "author": self.name.partition("/")[0],
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "createdAt": DATE,
            "lastModified": DATE,
            "siblings": [{"rfilename": name} for name in self.files],
        }

    def entry(self, path: str) -> dict[str, Any] | None:
        """What the hub tells of one file or folder, None if there is neither."""
        file = self.files.get(path)
        if file is not None:
            content = _content(file)
            told = {"type": "file", "path": path, "size": content.bytes, "oid": content.git_id}
            large = {"oid": content.sha256, "size": content.bytes, "pointerSize": 135}
            return told | ({"lfs": large} if path.endswith(LARGE) else {})
        if any(name.startswith(f"{path}/") for name in self.files):
            return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
        return None

    def tree(self, below: str, deep: bool) -> list[dict[str, Any] | None]:
        """Files and folders below a folder ("" is the top), in all depths or in the first."""
        start = f"{below}/" if below else ""
        parts = [name.removeprefix(start).split("/") for name in self.files if name.startswith(start)]
        paths = {start + "/".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1 if deep else 2)}
        return [self.entry(path) for path in sorted(paths)]


@dataclass(frozen=True)
class _Content:
    bytes: int
    sha256: str
    git_id: str


def _content(path: Path) -> _Content:
    stat = path.stat()
    return _hashed(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _hashed(path: Path, size: int, changed: int) -> _Content:
    """The hashes of a file, read once for each version of it."""
    data = path.read_bytes()
    return _Content(size, hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % size + data).hexdigest())


class _Answer(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing on stderr; `Hub.log` has it."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def _spoilt(self) -> bool:
        """True if the answer was spoilt, as `Hub.fault` says."""
        fault = self.server.fault
        if fault.isdigit():
            self._send(int(fault), b'{"error": "no"}', "application/json", {})
        elif fault == "slow":
            time.sleep(self.server.slow_seconds)
            self.close_connection = True
        elif fault == "cut":
            self.server.log.append(f"{self.command} {self.path} -> cut")
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b'{"sha": "')
            self.close_connection = True
        return bool(fault)

    def do_GET(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        if address.path.startswith("/fault/"):
            self.server.fault = address.path.removeprefix("/fault/")
            return self._send(200, b"", "text/plain", {})
        if self._spoilt():
            return None
        path = urllib.parse.unquote(address.path)
        if found := RESOLVE.fullmatch(path):
            return self._file("datasets" if found[1] else "models", found[2], found[3], found[4])
        if (found := API.fullmatch(path)) and found[3] != "paths-info":
            repository = self._repository(found[1], found[2], found[4] or "main")
            if repository is None:
                return None
            if found[3] != "tree":
                return self._json(repository.info() | {"private": repository.name in self.server.private})
            deep = urllib.parse.parse_qs(address.query).get("recursive", [""])[0].lower() == "true"
            entries = repository.tree(found[5] or "", deep)
            return self._json(entries) if entries or not found[5] else self._missing("EntryNotFound", found[5])
        return self._missing("", f"not served: {path}")

    def do_PUT(self) -> None:
        digest = self.path.removeprefix("/lfs/")
        if self.server.uploads_left <= 0:
            self.server.log.append(f"PUT {self.path} -> cut")
            self.rfile.read(100)
            self.close_connection = True
            return None
        data = self._body()
        if hashlib.sha256(data).hexdigest() != digest:
            return self._send(400, b"{}", "application/json", {})
        self.server.uploads_left -= 1
        self.server.stored[digest] = data
        return self._json({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _pushed(self, path: str, body: bytes) -> bool:
        """True if this was a part of a push, and has been answered."""
        push, batch = PUSH.fullmatch(path), BATCH.fullmatch(path)
        if not (push or batch or path in ("/api/repos/create", "/api/validate-yaml")):
            return False
        if not self.headers.get("Authorization"):
            self._send(401, b'{"error": "Invalid username or password."}', "application/json", {})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            (self.server.root / "models" / name).mkdir(parents=True)
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(name)
            self._json({"url": f"{self.server.url}/{name}", "name": name, "id": "0" * 24})
        elif batch:
            self._json({"transfer": "basic", "objects": [self._wanted(each) for each in json.loads(body)["objects"]]})
        elif push and push[2] == "preupload":
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in files}
            told = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self._json({"files": told})
        elif push:
            self._commit(push[1], [json.loads(line) for line in body.splitlines()])
        return True

    def _wanted(self, file: dict[str, Any]) -> dict[str, Any]:
        """What Git LFS is told about a large file: where to send it, unless it is there."""
        told = {"oid": file["oid"], "size": file["size"]}
        if file["oid"] in self.server.stored:
            return told
        return told | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{file['oid']}", "header": {}}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = Repository("models", name, self.server.root / "models" / name)
        for each in lines:
            value = each["value"]
            if each["key"] == "header":
                continue
            file = repository.folder / value["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            large = each["key"] == "lfsFile"
            file.write_bytes(self.server.stored[value["oid"]] if large else base64.b64decode(value["content"]))
        commit = repository.commit
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})

    def do_POST(self) -> None:
        if self._spoilt():
            return None
        sent = self._body()
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if self._pushed(path, sent):
            return None
        body = sent.decode()
        found = API.fullmatch(path)
        if not found or found[3] != "paths-info":
            return self._missing("", f"not served: {self.path}")
        repository = self._repository(found[1], found[2], found[4])
        if repository is None:
            return None
        try:
            asked = json.loads(body)["paths"]
        except ValueError:
            asked = urllib.parse.parse_qs(body).get("paths", [])
        entries = [repository.entry(path) for path in ([asked] if isinstance(asked, str) else asked)]
        return self._json([entry for entry in entries if entry])

    def _repository(self, kind: str, name: str, revision: str) -> Repository | None:
        """The repository if it has that revision; else None, and the client has been told."""
        repository = Repository(kind, name, self.server.root / kind / name)
        if ".." in name or not repository.folder.is_dir():
            self._missing("RepoNotFound", "Repository not found")
        elif not repository.has(revision):
            self._missing("RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository
        return None

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name, revision)
        if repository is None:
            return None
        entry = repository.entry(path)
        if entry is None or entry["type"] == "directory":
            return self._missing("EntryNotFound", "Entry not found", {"X-Repo-Commit": repository.commit})
        data = repository.files[path].read_bytes()
        tag = entry.get("lfs", entry)["oid"]
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-ETag": f'"{tag}"', "X-Linked-Size": str(entry["size"])}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part and self.command == "GET":
            start, end = int(part[1]), int(part[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(206, data[start : end + 1], "application/octet-stream", headers)
        return self._send(200, data, "application/octet-stream", headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json", {})

    def _missing(self, code: str, text: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": text, **(headers or {})}
        self._send(404, json.dumps({"error": text}).encode(), "application/json", named)

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.server.log.append(f"{self.command} {self.path} -> {status}")
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
