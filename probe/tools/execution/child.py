"""The process that runs one tool: limits first, then the function, then one line of JSON.

Started as a script with the path of a request and a file descriptor for the answer. It imports little, since
every call pays for it. The answer channel gets the line `started` and then `{"value": …}` or
`{"error": kind, "message": …}`; a process that ends without the second was killed or left by itself.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from typing import Any

_PROCESSES = ("os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "subprocess.Popen", "pty.spawn")  # fmt: skip
_NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname")  # fmt: skip
_SIGNALS = ("os.kill", "os.killpg", "signal.pthread_kill")
_FILE_BYTES = 64 * 2**20


class ForbiddenAccess(PermissionError):
    """A tool tried what its limits do not allow."""


def main(request_path: str, channel: int) -> None:
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    os.unlink(request_path)
    _confine(request["limits"])
    os.write(channel, b"started\n")
    answer = json.dumps(_answer(request), allow_nan=False).encode() + b"\n"
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed by the tool
            pass
    view = memoryview(answer)
    while view:
        view = view[os.write(channel, view) :]
    os._exit(0)  # threads and exit handlers that a tool left behind do not hold the answer up


def _confine(limits: dict) -> None:
    import resource

    seconds = math.ceil(limits["seconds"])
    # The parent ends a call on time; these end it when the parent is gone.
    signal.alarm(seconds + 5)
    for name, value in (
        (resource.RLIMIT_CPU, seconds + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(name, (value, value))
        except (OSError, ValueError):  # macOS has no limit of address space
            pass
    denied = set(_SIGNALS)
    denied |= set() if limits["processes"] else set(_PROCESSES)
    denied |= set() if limits["network"] else set(_NETWORK)

    def hook(event: str, arguments: tuple) -> None:
        if event in denied:
            raise ForbiddenAccess(f"{event} is not allowed in this tool")

    sys.addaudithook(hook)


def _answer(request: dict) -> dict:
    try:
        value = _load(request)(**request["arguments"])
    except ForbiddenAccess as error:
        return {"error": "forbidden", "message": str(error)}
    except MemoryError:
        return {"error": "memory_limit", "message": "the tool ran out of memory: ask for less"}
    except BaseException as error:
        # By name: the class in a file that is run as a script would be another one.
        if type(error).__module__ == "probe.tools.execution.failure":
            return {"error": getattr(error, "kind", "refused"), "message": _words(error)}
        return {"error": "raised", "message": f"{type(error).__name__}: {_words(error)}"}
    try:
        # Text that UTF-8 cannot hold is no JSON either.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return {"error": "bad_result", "message": f"the tool returned no JSON value: {error}"}
    return {"value": value}


def _words(error: BaseException) -> str:
    """An exception's text, which may be as long as the tool likes, or fail itself."""
    try:
        return str(error)[:2000]
    except Exception:
        return ""


def _load(request: dict):
    sys.path[:] = request["path"]
    if request["file"]:
        from importlib.util import module_from_spec, spec_from_file_location

        spec = spec_from_file_location(request["module"], request["file"])
        assert spec and spec.loader
        module = sys.modules[request["module"]] = module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        from importlib import import_module

        module = import_module(request["module"])
    value: Any = module
    for part in request["attribute"].split("."):
        value = getattr(value, part)
    return value


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
