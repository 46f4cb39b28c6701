"""A local server that replaces the Hugging Face hub. It serves folders, records requests, can interrupt downloads."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download, hf_api

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """One repository on a server of its own.

    Attributes:
        repository: owner/name.
        folder: its files.
        address: of the server.
        fetched: (file, first byte) of every download that was begun.
        cut_after: file → bytes after which the connection breaks, once.
        down: files that the server refuses with an error.
    """

    def __init__(self, repository: str, folder: Path) -> None:
        self.repository, self.folder = repository, folder
        self.address = ""
        self.fetched: list[tuple[str, int]] = []
        self.cut_after: dict[str, int] = {}
        self.down: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Names of the files whose content was fetched, each once."""
        return sorted({name for name, _ in self.fetched})

    def listing(self) -> list[dict[str, Any]]:
        """Return path, size and id of every file, as the hub lists them."""
        return [
            {"type": "file", "path": path.name, "rfilename": path.name, "size": path.stat().st_size, "oid": etag(path)}
            for path in sorted(self.folder.iterdir())
        ]


def etag(path: Path) -> str:
    """Return the id of a file's content."""
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def hub(repository: str, folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Serve a folder as a repository, to which the hub library of this process turns.

    Args:
        repository: owner/name.
        folder: its files.
        monkeypatch: of the test.
        cache: folder for the cache of the hub library.
    """
    served = Hub(repository, folder)
    handler = type("Handler", (_Handler,), {"hub": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    served.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    template = f"{served.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # Clients that were made for another address.
    monkeypatch.setattr(hf_api.api, "endpoint", served.address)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    # The library waits a second before it continues a broken download.
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _answer(self, body: bool) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.hub
        api, files = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            self._json({"id": hub.repository, "sha": COMMIT, "siblings": hub.listing()})
        elif path.startswith(f"{api}/tree/"):
            inside = path.removeprefix(f"{api}/tree/").partition("/")[2]
            self._json([] if inside else hub.listing())
        elif path.startswith(files):
            self._file(path.removeprefix(files).partition("/")[2], body)
        else:
            self._missing()

    def _json(self, data: Any) -> None:
        text = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _missing(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, name: str, body: bool) -> None:
        path = self.hub.folder / name
        if not path.is_file():
            return self._missing()
        if body and name in self.hub.down:
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        content = path.read_bytes()
        wanted = self.headers.get("Range")
        first = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag(path)}"')
        self.send_header("Content-Length", str(len(content) - first))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return None
        self.hub.fetched.append((name, first))
        end = self.hub.cut_after.pop(name, len(content))
        self.wfile.write(content[first:end])
        if end < len(content):
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        return None
