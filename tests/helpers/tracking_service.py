"""A Weights & Biases service on 127.0.0.1, with what one run needs of it, that can fail after the start."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

BUCKET = {
    "id": "UnVu",
    "name": "run1",
    "displayName": "quickstart",
    "description": None,
    "config": "{}",
    "sweepName": None,
    "historyLineCount": 0,
    "project": {"id": "UHJv", "name": "house-rules", "entity": {"id": "RW50", "name": "someone"}},
}
VIEWER = {"id": "VXNl", "username": "someone", "entity": "someone", "flags": "{}", "teams": {"edges": []}}


class Service(ThreadingHTTPServer):
    """Receives a run at `url`: `with Service() as service`. With `breaks`, every request after the start fails."""

    daemon_threads = True

    def __init__(self, breaks: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _RequestHandler)
        self.breaks, self.started, self.log = breaks, False, list[str]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _RequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def log_message(self, *_: object) -> None:
        """Say nothing on stderr."""

    def do_GET(self) -> None:
        self._send(200, {})

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        self.server.log.append(f"{self.path} {body[:20000]}")
        if self.server.started and self.server.breaks:
            return self._break()
        if "upsertBucket" in body:
            self.server.started = True
        data: dict[str, Any] = {"upsertBucket": {"bucket": BUCKET, "inserted": True}, "viewer": VIEWER}
        data["createRunFiles"] = {"runID": "run1", "uploadHeaders": [], "files": []}
        return self._send(200, {"data": data, "exitcode": None, "limits": {}})

    def _break(self) -> None:
        match self.server.breaks:
            case "slow":
                time.sleep(60)
            case "cut":
                self.close_connection = True
            case status:
                self._send(int(status), {"error": "no"})

    def _send(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
