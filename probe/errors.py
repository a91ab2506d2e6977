"""Errors a user can act on: printed as one message without a traceback, each with its exit code."""


class ProbeError(Exception):
    """Some task failed, or a comparison found a difference (exit code 1)."""

    exit_code = 1


class UsageError(ProbeError):
    """The call's options do not fit together."""

    exit_code = 2


class BadInput(ProbeError):
    """A task file or tool catalogue has mistakes.

    `problems` holds every mistake as one `FILE:LINE:COLUMN: field: what is wrong: what to do` line.
    """

    exit_code = 3

    def __init__(self, problems: list[str], shown: int = 20):
        self.problems = problems
        lines = problems[:shown]
        if len(problems) > shown:
            lines.append(f"… and {len(problems) - shown} more")
        super().__init__("\n".join(lines))


class RunDirectoryError(ProbeError):
    """A run directory is busy, not empty, missing or made by another command."""

    exit_code = 4


class ArtifactCorrupt(ProbeError):
    """A saved file is missing, truncated or altered."""

    exit_code = 5


class ModelUnavailable(ProbeError):
    """The model is not available here; the message says what to do."""

    exit_code = 6


class DiskError(ProbeError):
    """Writing failed: no space, no permission or an I/O error."""

    exit_code = 7


def error_of(exit_code: int, message: str) -> ProbeError:
    """An error as another process reported it."""
    kinds = {kind.exit_code: kind for kind in ProbeError.__subclasses__() if kind.__module__ == __name__}
    kind = kinds.get(exit_code, ProbeError)
    return BadInput([message]) if kind is BadInput else kind(message)
