"""The report in a browser while a run trains: made anew for each request, and served on this machine alone.

    browser ─► GET / ─► the run folder's files ─► the page, which the browser asks for again until the run has ended

Knows run folders and HTTP; must not know the process that trains.
"""

from __future__ import annotations

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qlora.errors import InputError, RunError
from qlora.reporting.figures import summarise
from qlora.reporting.page import render
from qlora.reporting.records import read_records

HERE = "127.0.0.1"
PORT = 8712
REFRESH = 5  # seconds


def server(folder: Path, port: int | None = None) -> ThreadingHTTPServer:
    """A server of the report of ``folder``, not yet serving; ``port``: 8712 or any free one unless it is given.

    It binds to 127.0.0.1, and answers requests for that name alone: a page from elsewhere must not read a run through a name
    of its own for this address. Raises RunError when ``folder`` is no run folder, and InputError when the port is taken.
    """
    read_records(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").partition(":")[0] not in (HERE, "localhost"):
                return self._answer(HTTPStatus.FORBIDDEN, "Ask for 127.0.0.1.", "text/plain")
            if self.path != "/":
                return self._answer(HTTPStatus.NOT_FOUND, "The report is at /.", "text/plain")
            try:
                records = read_records(folder)
            except RunError as error:  # another run takes its place just now
                return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error), "text/plain", refresh=True)
            return self._answer(HTTPStatus.OK, render(records), "text/html", refresh=not summarise(records).finished)

        def _answer(self, status: HTTPStatus, text: str, kind: str, refresh: bool = False) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            if refresh:
                self.send_header("Refresh", str(REFRESH))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Requests are nobody's news."""

    try:
        return ThreadingHTTPServer((HERE, PORT if port is None else port), Handler)
    except (OSError, OverflowError) as error:
        if port is not None:
            raise InputError(
                f"Port {port} cannot be had ({error}); give another, or port=0 for any free one."
            ) from None
        return ThreadingHTTPServer((HERE, 0), Handler)
