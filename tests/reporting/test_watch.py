"""The report in a browser: as the files are now, asked for again while the run goes on, and on this machine alone."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from qlora.cli import main
from qlora.errors import InputError, RunError
from qlora.reporting.watch import server
from tests.reporting.conftest import RunFolder, step_line


@pytest.fixture
def served(begun: RunFolder) -> Iterator[ThreadingHTTPServer]:
    found = server(begun.path, 0)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def got(served: ThreadingHTTPServer, path: str = "/", **headers: str) -> tuple[int, str, str | None]:
    """(status, text, seconds until the browser asks again)."""
    connection = http.client.HTTPConnection("127.0.0.1", served.server_address[1], timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.getheader("Refresh")


def test_the_page_follows_the_run_until_it_has_ended(served: ThreadingHTTPServer, begun: RunFolder) -> None:
    status, text, refresh = got(served)
    assert (status, refresh) == (200, "5")
    assert "Not begun" in text
    begun.metrics([step_line(step) for step in (1, 2)])
    assert "Not finished, at step 2 of 40" in got(served)[1]
    begun.metrics([step_line(step) for step in range(1, 41)])
    status, text, refresh = got(served)
    assert (status, refresh) == (200, None)
    assert "Finished" in text
    assert not (begun.path / "report.html").exists()  # looking changes nothing


def test_only_this_machine_and_only_the_page(served: ThreadingHTTPServer) -> None:
    assert served.server_address[0] == "127.0.0.1"
    assert got(served, Host="evil.example")[0] == 403  # a name that was pointed at this address
    assert got(served, Host="localhost:80")[0] == 200
    assert got(served, "/../recipe.yaml")[0] == 404


def test_a_folder_that_is_gone_is_said_and_asked_for_again(served: ThreadingHTTPServer, begun: RunFolder) -> None:
    moved = begun.path.rename(begun.path.parent / "moved")
    status, text, refresh = got(served)
    assert (status, refresh) == (503, "5")
    assert "There is no run folder" in text
    moved.rename(begun.path)
    assert got(served)[0] == 200


def test_what_cannot_be_served_is_a_sentence(
    served: ThreadingHTTPServer, begun: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        server(tmp_path)
    with pytest.raises(InputError, match="port=0 for any free one"):
        server(begun.path, served.server_address[1])
    for wrong in ("port=", "port=99999", "port=http"):
        assert main(["watch", str(begun.path), wrong]) == 2
        assert "qlora: " in capsys.readouterr().err
