"""A stand-in for the Hugging Face hub on this machine: models with revisions, redirects of large
files to another host, ranges, checksums in ETags, and the hub's errors. It can also break off, be
busy, damage files and ignore ranges."""

import gzip
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler

from judge_server import QuietServer

LARGE = (".safetensors", ".bin", ".model")  # endings of the files that are kept in LFS
JSON = "application/json"


def git_sha1(content):
    """The checksum of a small file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def checksum(name, content):
    """The name of a file in blobs."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return git_sha1(content)


def describe(name, content):
    """A file's entry in the answer to /tree."""
    entry = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
    if name.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 100}
    return entry


class Hub(QuietServer):
    """The server, and what tests set and read of it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}"  # another host, as browsers count
        self.requests = []  # (method, host, path, headers)
        self.models = {}  # name -> {commit: {path: content}}
        self.refs = {}  # (name, branch) -> commit
        self.renamed = {}  # old name -> new name
        self.locations = {}  # name -> address that every request for it is redirected to
        self.gated = set()  # names
        self.members = set()  # tokens that have access to gated models
        self.busy = []  # (status, Retry-After) of the next requests
        self.breaks = 0  # so many bodies break off half-way
        self.stops_at = None  # a byte after which nothing of any file is sent
        self.pieces = {}  # path -> bytes sent instead of the content
        self.knows_ranges = True
        self.compresses = True  # where a client allows it
        arguments = (0.01,)  # seconds until shutdown() is noticed
        threading.Thread(target=self.serve_forever, args=arguments, daemon=True).start()

    def publish(self, name, files, branch="main"):
        """Add a commit to a model; returns it."""
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        self.models.setdefault(name, {})[commit] = files
        self.refs[name, branch] = commit
        return commit

    def seen(self, method="", ending=""):
        """The paths of the requests with this method, whose paths end so."""
        paths = []
        for request_method, _, path, _ in self.requests:
            if method in ("", request_method) and path.endswith(ending):
                paths.append(path)
        return paths


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append((self.command, headers["host"], self.path, headers))
        if hub.busy:
            status, pause = hub.busy.pop(0)
            return self.fail(status, "", "busy", {"Retry-After": pause} if pause else {})
        path = urllib.parse.urlsplit(self.path).path
        if path.startswith("/storage/"):
            return self.send_stored(path, headers)
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").split("/", 5)[1:]
        if len(parts) < 4:
            return self.fail(404, "", "no such page")
        name = "/".join(parts[:2])
        if name in hub.locations:
            return self.reply(302, b"", {"Location": hub.locations[name]})
        if name in hub.renamed:
            target = self.path.replace(name, hub.renamed[name])
            return self.reply(307, b"", {"Location": target})
        if name not in hub.models:
            has_token = "authorization" in headers
            return self.fail(404 if has_token else 401, "RepoNotFound", "Repository not found")
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if name in hub.gated and token not in hub.members:
            status = 403 if token else 401
            return self.fail(status, "GatedRepo", f"Access to model {name} is restricted.")
        revision = urllib.parse.unquote(parts[3])
        commit = hub.refs.get((name, revision), revision)
        files = hub.models[name].get(commit)
        if files is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if is_api and parts[2] == "revision":
            siblings = [{"rfilename": file} for file in files]
            value = {"id": name, "sha": commit, "siblings": siblings}
            return self.reply(200, json.dumps(value).encode(), {"Content-Type": JSON})
        if is_api:
            value = [describe(*file) for file in files.items()]
            return self.reply(200, json.dumps(value).encode(), {"Content-Type": JSON})
        return self.send_file(name, commit, files, "/".join(parts[4:]), headers)

    def send_file(self, name, commit, files, file, headers):
        if file not in files:
            return self.fail(404, "EntryNotFound", "Entry not found")
        content = files[file]
        facts = {"X-Repo-Commit": commit}
        etag = f'"{checksum(file, content)}"'
        if file.endswith(LARGE):
            facts["X-Linked-Size"] = str(len(content))
            facts["X-Linked-ETag"] = etag
            facts["Location"] = f"{self.server.storage}/storage/{name}/{commit}/{file}"
            return self.reply(302, b"", facts)
        facts["ETag"] = etag
        content = self.server.pieces.get(file, content)
        if self.server.compresses and "gzip" in headers.get("accept-encoding", ""):
            facts["ETag"] = "W/" + etag
            facts["Content-Encoding"] = "gzip"
            return self.reply(200, gzip.compress(content), facts, with_length=False)
        if file.endswith(".jinja"):
            facts["ETag"] = "W/" + etag
        return self.send_range(content, headers, facts)

    def send_stored(self, path, headers):
        """A large file, from the host where they are stored. It takes no token of the hub's."""
        org, name, commit, file = path.removeprefix("/storage/").split("/", 3)
        if "authorization" in headers or not headers["host"].startswith("localhost"):
            return self.fail(400, "", "two ways to sign a request")
        content = self.server.models[f"{org}/{name}"][commit][file]
        content = self.server.pieces.get(file, content)
        self.send_range(content, headers, {"ETag": '"md5-of-parts"'})

    def send_range(self, content, headers, facts):
        hub = self.server
        start = 0
        if hub.knows_ranges and "range" in headers:
            start = int(headers["range"].removeprefix("bytes=").removesuffix("-"))
        if start and start >= len(content):
            return self.fail(416, "", "nothing follows")
        body = content[start:]
        facts = {**facts, "Content-Length": str(len(body))}
        if hub.breaks and self.command == "GET" and len(body) > 1:
            hub.breaks -= 1
            body = body[: len(body) // 2]
        if hub.stops_at is not None:
            body = body[: max(0, hub.stops_at - start)]
        self.reply(206 if start else 200, body, facts)

    def fail(self, status, code, message, headers={}):
        facts = {"X-Error-Message": message, **headers}
        if code:
            facts["X-Error-Code"] = code
        self.reply(status, message.encode(), facts)

    def reply(self, status, body, headers, with_length=True):
        headers = dict(headers)
        if with_length:
            headers.setdefault("Content-Length", str(len(body)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass
