"""Real HTTP servers on this machine for tests of downloads: a package index, hubs with a data set and that refuse."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import socket
import threading
import zipfile
from contextlib import contextmanager


def wheel(name="toy", version="1.0", members=None):
    """A wheel's file name and bytes, with further members."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **(members or {f"{name}/data.txt": "some data " * 2000}),
    }
    files[f"{info}/RECORD"] = "".join(f"{n},,\n" for n in files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return f"{name}-{version}-py3-none-any.whl", buffer.getvalue()


@contextmanager
def served(handler):
    """A server in a thread; its URL is yielded."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def package_index(name, file, data):
    """A simple index with one file. ``state["cut"]`` makes every download end in its middle; ``state["told"]``, that
    its length is not told before, so that only the file itself can tell."""
    state = {"cut": True, "told": True, "downloads": 0}

    class Index(Quiet):
        def do_GET(self):
            if self.path.rstrip("/").endswith(f"/simple/{name}"):
                mark = f"#sha256={hashlib.sha256(data).hexdigest()}" if state["told"] else ""
                page = f'<!DOCTYPE html><html><body><a href="/files/{file}{mark}">{file}</a></body></html>'
                self._send(page.encode(), "text/html")
            elif self.path == f"/files/{file}":
                state["downloads"] += 1
                self.send_response(200)
                if state["told"]:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if state["cut"] else data)
            else:
                self.send_error(404)

        def _send(self, body, kind):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with served(Index) as url:
        yield url, state


COMMIT = "1" * 40


def data_set(files, sent):
    """A hub with one data set, org/name, of these files (path -> bytes); ``sent`` collects (path, bytes sent)."""

    class Hub(Quiet):
        def do_GET(self):
            path = self.path.partition("?")[0]
            if f"/resolve/{COMMIT}/" in path:
                self._file(path.partition(f"/resolve/{COMMIT}/")[2])
            elif "/tree/" in path:
                below = path.partition(f"/tree/{COMMIT}")[2].strip("/")
                inside = [name for name in files if name.rpartition("/")[0] == below]
                folders = {name.partition("/")[0] for name in files if "/" in name} if not below else ()
                found = [{"type": "file", "path": name, "size": len(files[name]), "oid": "a" * 40} for name in inside]
                self._json(found + [{"type": "directory", "path": name, "oid": "b" * 40} for name in folders])
            elif path.startswith("/api/datasets/org/name"):
                siblings = [{"rfilename": name} for name in files]
                self._json({"id": "org/name", "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
            else:
                self._send(404, b"")

        def _file(self, name):
            if name not in files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            data, told = files[name], {"X-Repo-Commit": COMMIT, "ETag": '"a"', "Accept-Ranges": "bytes"}
            if asked := self.headers.get("Range"):
                first, _, last = asked.partition("=")[2].partition("-")
                part = data[int(first) : int(last or len(data) - 1) + 1]
                told["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
                sent.append((name, len(part)))
                self._send(206, part, told)
            else:
                self._send(200, data, told)

        def _json(self, data):
            self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

        def _send(self, status, body, headers=None):
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    return Hub


def refusing(status):
    """A handler that answers everything with one status."""

    class Refusing(Quiet):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

    return Refusing


def closed_port():
    """The URL of a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
