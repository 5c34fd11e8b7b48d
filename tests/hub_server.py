"""A stand-in for the Hugging Face hub on this machine: the few addresses that d1jax asks, without xet and LFS."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_the_tests"


class Hub:
  """The repositories of a hub, and what was asked of it.

  Attributes:
    files: the files of `model/owner/name` or `dataset/owner/name` at its newest commit.
    gated, private: names of repositories that need something else, or a token.
    asked: (method, path, token) of all requests.
    cut: a path whose next answer breaks off in the middle.
  """

  def __init__(self) -> None:
    self.files: dict[str, dict[str, bytes]] = {}
    self.gated: set[str] = set()
    self.private: set[str] = set()
    self.asked: list[tuple[str, str, str | None]] = []
    self.cut = ""
    self.made: list[dict] = []

  def commit(self, name: str) -> str:
    digest = hashlib.sha1(name.encode())
    for path, content in sorted(self.files[name].items()):
      digest.update(path.encode() + content)
    return digest.hexdigest()

  def fetched(self) -> list[str]:
    """The files that were downloaded, each once."""
    return sorted({path.split("/resolve/")[1].split("/", 1)[1] for m, path, _ in self.asked if "/resolve/" in path})

  @contextlib.contextmanager
  def running(self) -> Iterator[str]:
    """The address of the hub while it answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": self}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}"
    finally:
      server.shutdown()
      thread.join()
      server.server_close()


class _Answers(BaseHTTPRequestHandler):
  hub: Hub
  protocol_version = "HTTP/1.1"

  def log_message(self, *arguments: object) -> None:
    pass

  def _send(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def _refuse(self, status: int, code: str) -> None:
    self._send(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

  def _token(self) -> str | None:
    return (self.headers.get("authorization") or "").removeprefix("Bearer ") or None

  def _allowed(self, name: str) -> bool:
    if name not in self.hub.files or (name in self.hub.private and self._token() != TOKEN):
      self._refuse(401, "RepoNotFound")
    elif name in self.hub.gated:
      self._refuse(403, "GatedRepo")
    else:
      return True
    return False

  def do_HEAD(self) -> None:
    self.do_GET()

  def do_GET(self) -> None:
    path = unquote(urlsplit(self.path).path)
    self.hub.asked.append((self.command, path, self._token()))
    if path == "/api/whoami-v2":
      return self._send(200, {"name": "somebody", "type": "user", "orgs": [{"name": "lab"}]})
    if path.startswith("/api/") and path.count("/") < 4:
      return self._refuse(404, "EntryNotFound")
    if path.startswith("/api/"):
      _, _, kinds, owner, repository, *rest = path.split("/")
      name = f"{kinds.removesuffix('s')}/{owner}/{repository}"
      return self._listing(name, rest) if self._allowed(name) else None
    before, _, behind = path.partition("/resolve/")
    name = before[1:].replace("datasets/", "dataset/", 1) if before.startswith("/datasets/") else f"model{before}"
    return self._file(name, behind.partition("/")[2]) if self._allowed(name) else None

  def _listing(self, name: str, rest: list[str]) -> None:
    files, commit = self.hub.files[name], self.hub.commit(name)
    if len(rest) > 1 and rest[1] not in ("main", commit):
      return self._refuse(404, "RevisionNotFound")
    if rest[:1] == ["tree"]:
      oid = lambda content: hashlib.sha1(content).hexdigest()
      return self._send(200, [{"type": "file", "path": p, "size": len(c), "oid": oid(c)} for p, c in files.items()])
    siblings = [{"rfilename": path} for path in files]
    return self._send(200, {"id": name.partition("/")[2], "sha": commit, "siblings": siblings, "private": False})

  def _file(self, name: str, path: str) -> None:
    content = self.hub.files[name].get(path)
    if content is None:
      return self._refuse(404, "EntryNotFound")
    headers = {"X-Repo-Commit": self.hub.commit(name), "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
    first = int((self.headers.get("range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
    if self.command == "GET" and path == self.hub.cut:
      self.hub.cut = ""
      self.send_response(200)
      for header, value in (headers | {"Content-Length": str(len(content))}).items():
        self.send_header(header, value)
      self.end_headers()
      self.wfile.write(content[: len(content) // 2])
      self.wfile.flush()
      self.close_connection = True
      return None
    part = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if first else {}
    return self._send(206 if first else 200, content[first:], headers | part)

  def do_POST(self) -> None:
    path = unquote(urlsplit(self.path).path)
    body = self.rfile.read(int(self.headers["content-length"]))
    self.hub.asked.append(("POST", path, self._token()))
    if path == "/api/validate-yaml":
      return self._send(200, {"errors": [], "warnings": []})
    if self._token() != TOKEN:
      return self._refuse(401, "Unauthorized")
    if path == "/api/repos/create":
      self.hub.made.append(json.loads(body))
      named = json.loads(body)
      return self._send(200, {"url": f"http://{self.headers['host']}/{named.get('organization')}/{named['name']}"})
    name = "model/" + "/".join(path.split("/")[3:5])
    files = self.hub.files.setdefault(name, {})
    if "/preupload/" in path:
      wanted = [one["path"] for one in json.loads(body)["files"]]
      plan = [{"path": one, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for one in wanted]
      return self._send(200, {"files": plan})
    for line in map(json.loads, body.decode().splitlines()):
      if line["key"] == "file":
        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
    commit, home = self.hub.commit(name), f"http://{self.headers['host']}/{name.partition('/')[2]}"
    return self._send(200, {"commitOid": commit, "commitUrl": f"{home}/commit/{commit}", "success": True})


@contextlib.contextmanager
def running(monkeypatch: pytest.MonkeyPatch, cache: object, token: str | None = None) -> Iterator[Hub]:
  """A hub that d1jax asks, with an empty cache and a token or none."""
  from huggingface_hub import constants
  from huggingface_hub.utils import disable_progress_bars

  hub = Hub()
  with hub.running() as address:
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the tests are kept off the true hub
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache) + "-no-token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
      monkeypatch.delenv(name, raising=False)
    if token is not None:
      monkeypatch.setenv("HF_TOKEN", token)
    disable_progress_bars()
    yield hub
