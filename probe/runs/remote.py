"""A run at a URL: names in it, and ranges of their bytes. Nothing is written there, and a server needs no list of files."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from probe.errors import DiskError, UsageError

if TYPE_CHECKING:
    import urllib.request

    import torch

_AHEAD = 1 << 16
"""Bytes of a file that are asked for at once: the header of most tensors fits."""
_SECONDS = 30
_WEB = re.compile(r"https?:", re.IGNORECASE)
_URL = re.compile(r"(https?|file)://", re.IGNORECASE)
_TOTAL = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+)")


class RunUrl:
    """A run at a URL, or a name in it: what reading asks of a path."""

    def __init__(self, url: str, names: tuple[str, ...] = ()):
        self._url, self._names = url, names

    def __truediv__(self, name: str) -> RunUrl:
        return RunUrl(self._url, (*self._names, *name.split("/")))

    def __str__(self) -> str:
        """The URL without what may be a secret: user, password and query."""
        parts = urlsplit(self._url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, self._path(parts.path), "", ""))

    def __repr__(self) -> str:
        return f"RunUrl({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunUrl) and (self._url, self._names) == (other._url, other._names)

    def __hash__(self) -> int:
        return hash((self._url, self._names))

    def _path(self, path: str) -> str:
        return "/".join([path.rstrip("/"), *(quote(name, safe="") for name in self._names)])

    @property
    def address(self) -> str:
        """Where its bytes are asked for; a query, such as a signature, goes to every name."""
        parts = urlsplit(self._url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, self._path(parts.path), parts.query, ""))

    @property
    def login(self) -> str | None:
        """Value of the header that says who asks, where the URL names a user."""
        user, at, _ = urlsplit(self._url).netloc.rpartition("@")
        return f"Basic {b64encode(unquote(user).encode()).decode()}" if at else None

    @property
    def name(self) -> str:
        return str(self).rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> RunUrl:
        return RunUrl(self._url, self._names[:-1])

    def relative_to(self, other: RunUrl) -> Path:
        return Path(*self._names[len(other._names) :])

    def resolve(self) -> RunUrl:
        return self

    def exists(self) -> bool:
        """False: a browser opens what lies there by its address, and nothing of probe does."""
        return False


def located(path: str | Path | RunUrl) -> Path:
    """A run's directory, or the URL of one (https, http, file), as what reading takes. Raises UsageError for another URL."""
    if isinstance(path, RunUrl):
        return cast("Path", path)
    text = str(path)
    if isinstance(path, Path) or not _URL.match(text):
        if isinstance(path, str) and re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
            raise UsageError(
                f"{text.partition('://')[0]}:// is not read: give a directory, or https:// or file://"
            )
        return Path(path)
    try:
        parts = urlsplit(text)
    except ValueError:  # may hold a password: it is not said again
        raise UsageError("no address: write https://HOST/PATH") from None
    if _WEB.match(text):
        return cast("Path", RunUrl(text))
    if parts.netloc not in ("", "localhost"):
        raise UsageError(
            f"{text}: file:// names this machine alone: write file:///{parts.netloc}{parts.path}"
        )
    from urllib.request import url2pathname

    return Path(url2pathname(parts.path))


class Ranges:
    """The bytes of one file at a URL, from front to back or from a place."""

    def __init__(self, path: RunUrl):
        """Asks for the first bytes. Raises FileNotFoundError and DiskError."""
        self._path = path
        self._ahead, self.size = _ask(path, 0, _AHEAD)
        self._at = 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        data = self.range(self._at, min(self._at + size, self.size))
        self._at += len(data)
        return data

    def range(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`. Raises FileNotFoundError and DiskError, also where the file has another length now."""
        if start >= end or end <= len(self._ahead):
            return self._ahead[start:end]
        data, size = _ask(self._path, start, end)
        if size != self.size or len(data) != end - start:
            raise DiskError(f"{self._path}: changed while it was read: open the run again")
        return data


def _ask(path: RunUrl, start: int, end: int) -> tuple[bytes, int]:
    """Bytes `start` to `end` of a file, fewer where it is shorter, and the bytes that it has."""
    import http.client
    import urllib.error
    import urllib.request

    request = urllib.request.Request(
        path.address, headers={"Range": f"bytes={start}-{end - 1}", "User-Agent": "probe"}
    )
    if path.login:
        request.add_unredirected_header("Authorization", path.login)
    try:
        with _opener().open(request, timeout=_SECONDS) as answer:
            if answer.status != http.client.PARTIAL_CONTENT:  # a server without ranges sends all of it
                data = answer.read()
                return data[start:end], len(data)
            first, total = _places(path, answer.headers.get("Content-Range"))
            data = answer.read()
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (404, 410):
                raise FileNotFoundError(str(path)) from None
            if error.code == 416:  # no byte of an empty file
                return b"", _places(path, error.headers.get("Content-Range"))[1]
            advice = (
                "write https://USER:PASSWORD@…, or copy the run here"
                if error.code in (401, 403)
                else "try again later"
            )
            raise DiskError(f"{path}: cannot be read: {error.code} {error.reason}: {advice}") from None
    except http.client.InvalidURL:  # its message has the query
        raise UsageError(f"{path}: is no address: write a space as %20") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DiskError(f"{path}: cannot be reached: {reason}: check the address and the network") from None
    if first != start or len(data) != min(end, total) - start:
        raise DiskError(f"{path}: the server sent other bytes than {start} to {end}: copy the run here")
    return data, total


def _places(path: RunUrl, header: str | None) -> tuple[int, int]:
    """First byte and length of the file, of a Content-Range."""
    match = _TOTAL.fullmatch(header or "")
    if match is None:
        raise DiskError(f"{path}: the server does not say how long it is: copy the run here")
    return int(match[1] or 0), int(match[2])


@cache
def _opener() -> urllib.request.OpenerDirector:
    """An opener of http and https alone: a redirection leads to no file of this machine."""
    import urllib.request

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


class RangeTensors:
    """The tensors of a file at a URL, each read by its range; as the safetensors reader of a file gives them."""

    def __init__(
        self, path: RunUrl, tensors: Mapping[str, Any], size: int, dtype_of: Callable[[str], torch.dtype]
    ):
        """`tensors` as in the header, of a file of `size` bytes."""
        self._ranges = Ranges(path)
        self._tensors, self._dtype_of = tensors, dtype_of
        self._data = size - max((info.end for info in tensors.values()), default=0)

    def get_tensor(self, name: str) -> Any:
        return self.get_slice(name)[...]

    def get_slice(self, name: str) -> RangeSlice:
        info = self._tensors[name]
        return RangeSlice(self._ranges, info, self._data + info.end, self._dtype_of(info.dtype))


class RangeSlice:
    """One tensor, of which an index reads the rows of the first axis that it names."""

    def __init__(self, ranges: Ranges, info: Any, end: int, dtype: torch.dtype):
        self._ranges, self._info, self._dtype = ranges, info, dtype
        self._row = dtype.itemsize * math.prod(info.shape[1:])
        rows = info.shape[0] if info.shape else 1
        self._start = end - rows * self._row

    def get_shape(self) -> list[int]:
        return list(self._info.shape)

    def get_dtype(self) -> str:
        return self._info.dtype

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        shape, first = self._info.shape, keys[0] if keys else ...
        if isinstance(first, int) and shape and -shape[0] <= first < shape[0]:
            return self._rows(first % shape[0], first % shape[0] + 1)[(0, *keys[1:])]
        if isinstance(first, slice) and shape and (first.step or 1) == 1:
            start, stop, _ = first.indices(shape[0])
            return self._rows(start, max(start, stop))[(slice(None), *keys[1:])]
        return self._rows(0, shape[0] if shape else 1)[keys]

    def _rows(self, start: int, stop: int) -> Any:
        import torch

        shape = (stop - start, *self._info.shape[1:]) if self._info.shape else ()
        data = bytearray(self._ranges.range(self._start + start * self._row, self._start + stop * self._row))
        if not data:  # of which torch makes no tensor
            return torch.empty(shape, dtype=self._dtype)
        return torch.frombuffer(data, dtype=self._dtype).reshape(shape)
