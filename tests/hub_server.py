"""A small server that answers as the Hugging Face Hub does: models are folders, and there is one commit."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub:
    """Serves `folder/org/name/...` at `address`; `asked` lists what was asked for: method, path and range."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[tuple[str, str, str | None]]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> list[str]:
        """The files of which the body was asked for without a range."""
        return [path.rsplit("/", 1)[-1] for method, path, span in self.asked if method == "GET" and span is None]

    def answer(self, request: Any, *, body: bool) -> None:
        path, span = request.path.split("?")[0].strip("/"), request.headers.get("Range")
        self.asked.append((request.command, path, span))
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            revision = parts[5] if len(parts) > 5 else "main"
            return self._info(request, "/".join(parts[2:4]), revision, tree="tree" in parts)
        if len(parts) < 5:
            return self._refuse(request, "RepoNotFound")
        name, revision, file = "/".join(parts[:2]), parts[3], self.folder.joinpath(*parts[:2], *parts[4:])
        if not (self.folder / name).is_dir():
            return self._refuse(request, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._refuse(request, "RevisionNotFound")
        if not file.is_file():
            return self._refuse(request, "EntryNotFound")
        return self._send(request, file.read_bytes(), span, body=body)

    def _info(self, request: Any, name: str, revision: str, *, tree: bool) -> None:
        folder = self.folder / name
        if not folder.is_dir():
            return self._refuse(request, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._refuse(request, "RevisionNotFound")
        names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
        answer: Any = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        if tree:
            answer = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": COMMIT} for n in names]
        return self._send(request, json.dumps(answer).encode(), None, body=True)

    def _refuse(self, request: Any, code: str) -> None:
        request.send_response(404)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _send(self, request: Any, data: bytes, span: str | None, *, body: bool) -> None:
        part = data
        if span:
            first, last = span.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1 if last else None]
        request.send_response(206 if span else 200)
        request.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", str(len(part)))
        request.send_header("Accept-Ranges", "bytes")
        request.end_headers()
        if body:
            request.wfile.write(part)
