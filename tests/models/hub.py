"""A small Hub on loopback: what huggingface_hub asks for files, with redirects, ranges, and transfers that break off."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34
LARGE = 4096  # bytes from which a file is served through a redirect with its SHA-256 as etag, as weights are


@dataclass
class Hub:
    """Serves the folders of `repos` ("owner/name" → folder), each with one commit, main."""

    repos: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    token: str = "hf_right"
    cut_after: int | None = None  # bytes of a large file after which the next transfer ends, once
    stall_after: int | None = None  # bytes of a large file after which transfers wait for `release`
    damage: bool = False  # flip a byte of large files
    requests: list[tuple[str, str, str | None]] = field(
        default_factory=list
    )  # answered with contents: method, file, Range
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def fetched(self) -> list[str]:
        """Names of the files whose contents were asked for whole or from an offset (not a header's range)."""
        return [
            name
            for method, name, span in self.requests
            if method == "GET" and (not span or span.endswith("-"))
        ]

    def ranges(self, file: str) -> list[str | None]:
        """The ranges in which the contents of `file` were fetched; None is the whole of it."""
        return [
            span
            for method, name, span in self.requests
            if method == "GET" and name == file and (not span or span.endswith("-"))
        ]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            parts = unquote(self.path).lstrip("/").split("/", 4)
            if len(parts) < 5:
                return self._refuse(404, "NotHere")
            owner, name, kind, revision, filename = parts
            repo = f"{owner}/{name}"
            if repo not in hub.repos:
                return self._refuse(404, "RepoNotFound")
            if repo in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._refuse(403, "GatedRepo")
            if revision not in ("main", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            path = hub.repos[repo] / filename
            if not path.is_file():
                return self._refuse(404, "EntryNotFound")
            data = path.read_bytes()
            large = len(data) >= LARGE
            digest = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data).hexdigest()
            if large and kind == "resolve":
                self.send_response(302)
                self.send_header("Location", f"{hub.url}/{repo}/cdn/{revision}/{filename}")
                self.send_header("X-Linked-Size", str(len(data)))
                self.send_header("X-Linked-Etag", f'"{digest}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            hub.requests.append((self.command, filename, self.headers.get("Range")))
            self._send(data, digest, large)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, data: bytes, digest: str, large: bool) -> None:
            start, end = 0, len(data)
            if span := self.headers.get("Range"):
                first, _, last = span.removeprefix("bytes=").partition("-")
                start, end = int(first), min(int(last) + 1, len(data)) if last else len(data)
            self.send_response(206 if span else 200)
            if span:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "HEAD":
                return
            if large and hub.damage:
                data = data[:-1] + bytes([data[-1] ^ 1])
            whole = large and end == len(data)
            if whole and hub.cut_after is not None:
                end, hub.cut_after = min(start + hub.cut_after, end), None
                self.close_connection = True
            if whole and hub.stall_after is not None:
                middle = min(start + hub.stall_after, end)
                self.wfile.write(data[start:middle])
                self.wfile.flush()
                hub.stalled.set()
                hub.release.wait(60)
                start = middle
            self.wfile.write(data[start:end])

    return Handler
