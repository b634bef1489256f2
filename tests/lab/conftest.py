"""Fixtures of the lab's tests: a web server on the loopback address, an empty download cache."""

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class Server:
    """What a web server on the loopback address answers, and what it was asked."""

    address: str
    answers: dict[str, tuple[int, bytes, int]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def publish(self, files):
        for name, body in files.items():
            self.answers[f"/{name}"] = (200, body, len(body))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answers.asked.append(self.path.lstrip("/"))
            status, body, length = answers.answers.get(self.path, (404, b"", 0))
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    answers = Server(f"http://127.0.0.1:{listener.server_port}/")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield answers
    listener.shutdown()
    listener.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The download cache, empty; no local copies."""
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.delenv("TRUESTEP_DATA", raising=False)
    return tmp_path / "cache" / "truestep"
