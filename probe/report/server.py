"""`probe view`: pages of runs over a loopback address, each task read from its run when it is opened.

What can be asked for is a fixed list: the list of runs, a run's page, its version, one task of it. Nothing is written, and no path of a
request becomes a path of a file. Every address begins with a random token, and a request has to name this server as its
host, so that pages of other places reach nothing (DNS rebinding).
"""

from __future__ import annotations

import html
import os
import secrets
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from probe.errors import ProbeError, RunDirectoryError
from probe.report import render
from probe.report.reader import TaskReader
from probe.report.text import visible
from probe.runs import Run

LOOPBACK = "127.0.0.1"
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_LIST_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'"


class ShownRun(NamedTuple):
    """A page of a run as it was at a version, and what answers it."""

    version: str
    page: str
    reader: TaskReader


class Server(ThreadingHTTPServer):
    """Serves the pages of these runs, and of nothing else; `address` is where a browser finds them."""

    daemon_threads = True
    poll_ms = 4000
    """How often an open page asks whether its run has changed."""

    def __init__(self, runs: Sequence[Run], port: int = 0) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.runs = list(runs)
        self.token = secrets.token_urlsafe(24)
        self._lock = Lock()
        self._shown: dict[int, ShownRun] = {}

    @property
    def host(self) -> str:
        """What a request has to name as its host."""
        return f"{LOOPBACK}:{self.server_address[1]}"

    @property
    def address(self) -> str:
        """The page of the only run, or the list of several."""
        return f"http://{self.host}/{self.token}/" + ("0/" if len(self.runs) == 1 else "")

    def answer(self, parts: list[str]) -> tuple[str, str] | None:
        """Content type and text of what is asked for; None where there is no such thing."""
        match parts:
            case [""]:
                return "text/html", _list_of(self.runs)
            case [run, ""] if (number := _number(run, len(self.runs))) is not None:
                return "text/html", self._page(number)
            case [run, "version"] if (number := _number(run, len(self.runs))) is not None:
                return "text/plain", self.runs[number].version()
            case [run, "task", version, place] if (number := _number(run, len(self.runs))) is not None:
                text = self._task(number, version, place)
                return None if text is None else ("application/json", text)
            case _:
                return None

    def _page(self, number: int) -> str:
        """The page of a run as it is now, read again where it has changed."""
        with self._lock:
            version = self.runs[number].version()
            if number not in self._shown or self._shown[number].version != version:
                run = self.runs[number] = Run(self.runs[number].path)
                page = render(run, "served", version=version, poll_ms=self.poll_ms)
                self._shown[number] = ShownRun(version, page, TaskReader(run))
            return self._shown[number].page

    def _task(self, number: int, version: str, place: str) -> str | None:
        """A task by its place in the page of that version. Raises RunDirectoryError where the page is older than the run."""
        with self._lock:
            if number not in self._shown or self._shown[number].version != version:
                raise RunDirectoryError("the run has changed since this page was read: reload it")
            reader = self._shown[number].reader
            at = _number(place, len(reader.run))
            return None if at is None else reader.read(at)


@contextmanager
def private_link(address: str) -> Iterator[str]:
    """The address of a file that leads to `address` and that this user alone can read; it goes with the context.

    A browser's command line can be listed by every user of a machine: it has to name no token.
    """
    descriptor, name = tempfile.mkstemp(prefix="probe-view-", suffix=".html")  # readable by its owner alone
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(_LINK.format(html.escape(address)))
        yield Path(name).as_uri()
    finally:
        with suppress(OSError):
            os.unlink(name)


class _Handler(BaseHTTPRequestHandler):
    server_version = "probe"
    sys_version = ""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        token, *parts = self.path.partition("?")[0].removeprefix("/").split("/")
        known = secrets.compare_digest(token.encode(), server.token.encode())
        here = self.headers.get("Host") == server.host
        try:
            answer = server.answer(parts) if known and here else None
        except ProbeError as error:  # a file of the run is damaged: the server goes on with the others
            return self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{error}\n")
        except (
            Exception
        ) as error:  # a fault of probe: whoever reads learns of it, and the terminal has all of it
            traceback.print_exc()
            text = f"probe failed here ({type(error).__name__}): the terminal of `probe view` says where\n"
            return self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", text)
        if answer is None:
            return self._send(HTTPStatus.NOT_FOUND, "text/plain", "There is no such page.\n")
        return self._send(HTTPStatus.OK, *answer)

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        with suppress(ConnectionError):  # a page that was closed before its answer came
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the addresses hold the token."""


def _number(text: str, below: int) -> int | None:
    """A place in a list, from its digits alone."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < below else None


def _list_of(runs: Sequence[Run]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    rows = [
        visible({"number": number, "name": run.path.name, "model": run.run["model"]["name"], "n": len(run)})
        for number, run in enumerate(runs)
    ]
    return environment.from_string(_LIST).render(rows=rows, policy=_LIST_POLICY)


_LINK = '<!doctype html>\n<meta charset="utf-8">\n<meta http-equiv="refresh" content="0; url={0}">\n<a href="{0}">probe</a>\n'
_LIST = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Runs · probe</title>
</head>
<body>
<main>
<h1>Runs</h1>
<ul>
{% for row in rows %}<li><a href="{{ row.number }}/">{{ row.name }}</a> · {{ row.model }} · {{ row.n }} tasks</li>
{% endfor %}</ul>
</main>
</body>
</html>
"""
