"""A Hugging Face hub on loopback: the endpoints that `huggingface_hub` asks, over real HTTP.

GET  /api/models/<repo>[/revision/<rev>]         commit and files
GET  /api/models/<repo>/tree/<rev>               files with sizes
POST /api/models/<repo>/paths-info/<rev>         some of them
HEAD, GET /<repo>/resolve/<rev>/<file>           content
POST /api/repos/create, /api/models/<repo>/branch/<rev>, /preupload/<rev>, /commit/<rev>
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from huggingface_hub import ModelCard

from helpers.processes import MAIN

TOKEN = "hf_loopback"


class Hub:
    """Repositories: name -> {"main": {file: bytes}, ...}; and what was asked.

    Attributes:
        repos: revision -> files, of every repository.
        refused: repository -> (status, X-Error-Code, X-Error-Message) that it answers to all.
        private: those that were made so.
        log: method and path of every request.
    """

    def __init__(self):
        self.repos, self.refused, self.private, self.log = {}, {}, set(), []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo, revision="main"):
        """Of a branch, or of a commit itself; None if there is none."""
        for name, files in self.repos[repo].items():
            digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            if revision in (name, digest):
                return digest
        return None

    def files(self, repo, revision="main"):
        return next(
            files for name, files in self.repos[repo].items()
            if self.commit(repo, revision) == self.commit(repo, name)
        )  # fmt: skip

    def gets(self, repo):
        """Names of the files whose content was sent."""
        return [path.split("/", 5)[5] for method, path in self.log
                if method == "GET" and path.startswith(f"/{repo}/resolve/")]  # fmt: skip

    def environment(self, home, **more):
        """Of a process that takes this for the hub; `home` is the cache. None unsets a variable."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        # Xet speaks to servers of its own.
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
               "D2C_MLX_CACHE": str(home / "d2c"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
        return {k: v for k, v in {**kept, **own, **more}.items() if v is not None}

    def run(self, home, *args, code=MAIN, cwd=None, **more):
        """The command, or other code, in a process of its own."""
        command = [sys.executable, "-W", "ignore", "-c", code, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False,
                              env=self.environment(home, **more), timeout=300, cwd=cwd)  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def _send(self, body, status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status, code="", message=""):
        self._send({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def _answer(self):
        self.body = self._body()
        path = unquote(self.path.split("?")[0])
        self.hub.log.append((self.command, path))
        match = re.match(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?$", path)
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if path == "/api/validate-yaml":
            assert ModelCard(json.loads(self.body)["content"]).data.license
            return self._send({"errors": [], "warnings": []})
        repo, rest = match[1], match[2] or ""
        if repo in self.hub.refused:
            return self._fail(*self.hub.refused[repo])
        if repo not in self.hub.repos:
            return self._fail(404, "RepoNotFound", "Repository not found")
        verb, _, rest = rest.partition("/")
        if self.command == "POST":
            return self._post(repo, verb, rest)
        revision, _, file = rest.partition("/")
        commit = self.hub.commit(repo, revision or "main")
        if commit is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = self.hub.files(repo, commit)
        if verb == "resolve":
            return self._content(files, file, commit)
        if verb == "tree":
            return self._send([_entry(name, data) for name, data in files.items()])
        self._send({
            "id": repo, "modelId": repo, "sha": commit, "private": repo in self.hub.private,
            "tags": [], "downloads": 0, "siblings": [{"rfilename": name} for name in files],
        })  # fmt: skip

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            data += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return data

    def _content(self, files, file, commit):
        if file not in files:
            return self._fail(404, "EntryNotFound", "Entry not found")
        etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
        self._send(files[file], ETag=etag, X_Repo_Commit=commit)

    def _create(self, asked):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(401, "", "Invalid username or password.")
        repo = f"{asked.get('organization')}/{asked['name']}"
        if repo in self.hub.refused:
            return self._fail(*self.hub.refused[repo])
        if repo in self.hub.repos:
            return self._send({"url": f"{self.hub.url}/{repo}", "error": "exists"}, 409)
        self.hub.repos[repo] = {"main": {}}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        self._send({"url": f"{self.hub.url}/{repo}", "id": repo})

    def _post(self, repo, verb, revision):
        asked = json.loads(self.body) if verb != "commit" and self.body else {}
        if verb == "paths-info":
            files = self.hub.files(repo, revision)
            paths = asked["paths"]
            return self._send([_entry(p, files[p]) for p in paths if p in files])
        if verb == "branch":
            if revision in self.hub.repos[repo]:
                return self._fail(409, "", "Reference already exists")
            self.hub.repos[repo][revision] = dict(self.hub.repos[repo]["main"])
            return self._send(b"")
        if verb == "preupload":
            about = {"shouldIgnore": False, "oid": None, "uploadMode": "regular"}
            return self._send({"files": [about | {"path": x["path"]} for x in asked["files"]]})
        files = dict(self.hub.repos[repo][revision])
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.repos[repo][revision] = files
        commit = self.hub.commit(repo, revision)
        self._send({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit,
                    "success": True})  # fmt: skip


def _entry(name, data):
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
