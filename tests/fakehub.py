"""FakeHub: folders served on loopback the way the Hugging Face Hub serves repositories.

The real clients talk to it: point HF_ENDPOINT at `.endpoint` in a fresh process, or pass endpoint=. It knows
repository info, trees, paths-info, auth-check and file downloads with ETag, commit and byte ranges, and the
Hub's error codes. With `uploads`, a folder, and `accounts`, it takes new repositories, commits and LFS objects of
whoever has the token. It does not know commits other than the one it makes up, other logins, or Xet.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)"
    r"(?:/(auth-check|revision|tree|paths-info|preupload|commit)(?:/([^/]+)(?:/(.*))?)?)?"
)
LFS = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
OBJECT = re.compile(r"/lfs/([0-9a-f]{64})")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class FakeHub:
    """A context manager; `requests` lists "METHOD path" in order of arrival, `logins` those that came with a token.

    private: repositories that are there only for who comes with one.
    """

    def __init__(
        self,
        models: Mapping[str, Path] | None = None,
        datasets: Mapping[str, Path] | None = None,
        gated: set[str] | None = None,
        private: set[str] | None = None,
        uploads: Path | None = None,
        accounts: Mapping[str, str] | None = None,
    ) -> None:
        """accounts: token -> the name of its account."""
        self.repos = {"models": dict(models or {}), "datasets": dict(datasets or {})}
        self.gated, self.private = gated or set(), private or set()
        self.uploads: Any = uploads
        self.accounts = dict(accounts or {})
        self.public: set[str] = set()  # of the repositories made here
        self.tags: dict[str, list[str]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.logins: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "FakeHub":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, home: Path) -> dict[str, str]:
        """What a fresh process needs to talk to this hub alone, with all its caches under `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization"):
            self.hub.logins.append(self.hub.requests[-1])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if found := FILE.fullmatch(path):
            self._resolve(*found.groups())
        elif found := OBJECT.fullmatch(path):
            self.hub.objects[found[1]] = body
            self._answer(200, b"")
        elif path == "/api/repos/create" or path == "/api/validate-yaml" or LFS.fullmatch(path):
            self._write(path, json.loads(body))
        elif (found := API.fullmatch(path)) and found[3] in ("preupload", "commit"):
            self._change(found[2], found[3], body)
        elif found := API.fullmatch(path):
            self._api(*found.groups(), body)
        else:
            self._fail(404, "", "Not found")

    def _api(
        self, kind: str, repo: str, what: str | None, revision: str | None, under: str | None, body: bytes
    ) -> None:
        folder = self._folder(kind, repo, revision, needs_access=what == "auth-check")
        if folder is None:
            return
        files = _files(folder)
        if what == "auth-check":
            self._answer(200, b"")
        elif what == "tree":
            self._json([entry for entry in files if not under or entry["path"].startswith(under.rstrip("/") + "/")])
        elif what == "paths-info":
            wanted = self._form(body)
            self._json([entry for entry in files if entry["path"] in wanted])
        else:
            commit = _commit(folder)
            siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in files]
            gated = "auto" if repo in self.hub.gated else False
            private = bool(self.hub.uploads) and repo not in self.hub.public
            facts = {"id": repo, "sha": commit, "private": private, "gated": gated, "disabled": False}
            facts |= {"tags": self.hub.tags.get(repo, [])}
            self._json(facts | {"siblings": siblings, "downloads": 0, "likes": 0})

    def _resolve(self, prefix: str | None, repo: str, revision: str, name: str) -> None:
        folder = self._folder("datasets" if prefix else "models", repo, revision, needs_access=True)
        if folder is None:
            return
        if name not in {entry["path"] for entry in _files(folder)}:
            self._fail(404, "EntryNotFound", "Entry not found")
            return
        content = (folder / name).read_bytes()
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": _commit(folder), "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            self._answer(200, content, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._answer(206, content[first : last + 1], headers)

    def _write(self, path: str, asked: Any) -> None:
        """A new repository, a look at a card, or where an LFS object is to be put."""
        account = self._account()
        if not account:
            return self._fail(401, "", "Invalid username or password.")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path != "/api/repos/create":
            made = [{"oid": one["oid"], "size": one["size"]} for one in asked["objects"]]
            for one in made:
                one["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}
            return self._json({"transfer": "basic", "objects": made})
        owner, models = asked["organization"] or account, self.hub.repos["models"]
        repo = f"{owner}/{asked['name']}"
        if owner != account:
            return self._fail(403, "", f"You don't have the rights to create a model under the namespace {owner}")
        there = {"url": f"{self.hub.endpoint}/{repo}", "name": repo}
        if repo in models:
            return self._answer(409, json.dumps(there | {"error": "You already created this model repo"}).encode())
        models[repo] = self.hub.uploads / repo
        models[repo].mkdir(parents=True)
        if asked.get("visibility") == "public" or asked.get("private") is False:
            self.hub.public.add(repo)
        return self._json(there)

    def _change(self, repo: str, what: str, body: bytes) -> None:
        """Which files go as LFS objects (weights do), and the commit that brings them in."""
        if self._account() != repo.split("/")[0]:
            return self._fail(403, "", "Forbidden")
        folder = self.hub.repos["models"][repo]
        if what == "preupload":
            paths = [one["path"] for one in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            files = [{"path": path, "uploadMode": modes[path.endswith("s")], "shouldIgnore": False} for path in paths]
            return self._json({"files": files})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self._keep(folder / value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                self._keep(folder / value["path"], self.hub.objects[value["oid"]])
            elif line["key"] == "deletedFile":
                (folder / value["path"]).unlink()
        self.hub.tags[repo] = ["lora", "lora-studio"] if "- lora-studio\n" in _text(folder / "README.md") else []
        url = f"{self.hub.endpoint}/{repo}/commit/{_commit(folder)}"
        return self._json({"success": True, "commitOid": _commit(folder), "commitUrl": url, "hookOutput": ""})

    def _keep(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def _account(self) -> str | None:
        return self.hub.accounts.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _folder(self, kind: str, repo: str, revision: str | None, needs_access: bool) -> Path | None:
        """The repository's folder; answers the request itself where there is none to be had."""
        folder = self.hub.repos[kind].get(repo)
        hidden = repo in self.hub.private and not self.headers.get("Authorization")
        if folder is None or hidden:
            self._fail(404, "RepoNotFound", "Repository not found")
        elif needs_access and repo in self.hub.gated:
            self._fail(403, "GatedRepo", f"Access to {repo} is restricted")
        elif revision not in (None, "main", _commit(folder)):
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return folder
        return None

    def _form(self, body: bytes) -> list[str]:
        kind = self.headers.get("Content-Type") or ""
        if kind.startswith("application/json"):
            return json.loads(body)["paths"]
        if kind.startswith("multipart/"):
            message = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
            return [str(part.get_payload()).strip() for part in message.walk() if not part.is_multipart()]
        return parse_qs(body.decode()).get("paths", [])

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        self._answer(
            status, json.dumps({"error": message}).encode(), headers | ({"X-Error-Code": code} if code else {})
        )

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _files(folder: Path) -> list[dict[str, Any]]:
    """Every file of a repository as the tree endpoint lists it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": _oid(path.read_bytes()),
        }
        for path in paths
    ]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _commit(folder: Path) -> str:
    """A commit id that changes with the folder's content."""
    return _oid(json.dumps(_files(folder)).encode())
