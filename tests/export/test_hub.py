"""Publishing: what would go is listed, and what goes arrives. The hub is a stand-in on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import RunError
from qlora.export.hub import publish


class Hub(BaseHTTPRequestHandler):
    """Takes every file within the commit itself, as the hub does small ones."""

    made: dict[str, Any]
    arrived: dict[str, bytes]
    allowed = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not type(self).allowed or self.headers["Authorization"] != "Bearer hf_standin":
            self._answer(403, {"error": "You may not write there."})
        elif self.path == "/api/repos/create":
            type(self).made = json.loads(body)
            self._answer(
                200, {"url": f"http://{self.headers['Host']}/me/{self.made['name']}", "name": f"me/{self.made['name']}"}
            )
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                200,
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]},
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.arrived[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(
                200,
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1",
                    "commitOid": "1",
                    "pullRequestUrl": None,
                },
            )
        else:
            self._answer(404, {"error": f"no {self.path}"})

    def do_GET(self) -> None:
        self._answer(404, {"error": f"no {self.path}"})

    def _answer(self, status: int, values: dict[str, Any]) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    handler = type("HubHere", (Hub,), {"made": {}, "arrived": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub/a.txt").write_text("abc")
    (folder / ".README.md.writing-1").write_text("half")
    return folder


def sent(folder: Path, address: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The client reads the hub's address once, when it is imported."""
    code = f"from qlora.export.hub import publish; print(publish({str(folder)!r}, 'mine', **{options!r}))"
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_TOKEN": "hf_standin",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_a_dry_run_lists_and_asks_nobody(exported: Path) -> None:
    assert publish(exported, "me/mine", dry_run=True) == ("me/mine", {"config.json": 2, "sub/a.txt": 3}, None)


@pytest.mark.parametrize(
    ("repo", "empty", "said"),
    [("me/a b", False, "no name of a repository"), ("a/b/c", False, "no name of a repository"), ("mine", True, "holds no files to publish")],
)  # fmt: skip
def test_refused(exported: Path, tmp_path: Path, repo: str, empty: bool, said: str) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(RunError, match=said):
        publish(tmp_path / "nothing" if empty else exported, repo, dry_run=True)


@pytest.mark.slow
def test_what_is_sent_arrives(exported: Path, hub: tuple[type[Hub], str]) -> None:
    handler, address = hub
    done = sent(exported, address)
    assert done.returncode == 0, done.stderr
    assert handler.made.get("private") is True or handler.made["visibility"] == "private"  # as releases name it
    assert handler.arrived == {"config.json": b"{}", "sub/a.txt": b"abc"}


@pytest.mark.slow
def test_the_hub_says_no(exported: Path, hub: tuple[type[Hub], str]) -> None:
    handler, address = hub
    handler.allowed = False
    done = sent(exported, address)
    assert "RunError: Sending to 'mine' ended with" in done.stderr
    assert "hf auth login" in done.stderr.splitlines()[-1]
    assert handler.arrived == {}
