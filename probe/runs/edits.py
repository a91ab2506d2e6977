"""The file of edits: what `--edit` takes and what a run under edits keeps.

It is safetensors: the vectors, and in its metadata under `edits` a JSON list with what each does. Nothing in it is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from probe.capture.edits import Steering
from probe.errors import BadInput, UsageError
from probe.runs.files import EDITS
from probe.runs.manifest import checked_inputs


def encode_edits(edits: Sequence[Steering]) -> bytes:
    """The file: float32 vectors `0`, `1`, … and what each does."""
    from safetensors.torch import save

    vectors = {
        str(number): edit.values.detach().float().cpu().contiguous() for number, edit in enumerate(edits)
    }
    return save(vectors, {"edits": json.dumps([edit.document() for edit in edits])})


def kept_edits(path: Path, header: dict[str, Any]) -> tuple[Steering, ...]:
    """The edits that a run is under. Raises ArtifactCorrupt where its copy is damaged."""
    if not header.get("edits"):
        return ()
    return decode_edits(checked_inputs(path, header)[EDITS].read_bytes(), str(path / EDITS))


def edits_text(header: dict[str, Any]) -> str | None:
    """What the edits of a run do, in words of its run.json; None for a run without."""
    states = (header.get("edits") or {}).get("states", [])
    return "; ".join(" ".join(f"{name} {value}" for name, value in state.items()) for state in states) or None


def read_edits(path: str | Path) -> tuple[Steering, ...]:
    """The edits of a file. Raises BadInput for one that is none."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadInput([f"{path}:1:1: file: cannot be read ({error.strerror})"]) from None
    return decode_edits(data, str(path))


def decode_edits(data: bytes, name: str) -> tuple[Steering, ...]:
    """The edits of a file's bytes; `name` is for messages. Raises BadInput."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    def wrong(what: str) -> BadInput:
        return BadInput([f"{name}:1:1: edits: {what}; write one with `probe.write_edits`"])

    try:
        vectors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        rules: Any = json.loads(header["__metadata__"]["edits"])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise wrong(f"no safetensors file with a list of edits ({type(error).__name__})") from None
    if not isinstance(rules, list) or not rules:
        raise wrong("the list of edits is empty or none")
    edits: list[Steering] = []
    for number, rule in enumerate(cast("list[Any]", rules)):
        if not isinstance(rule, dict) or str(number) not in vectors:
            raise wrong(f"edit {number} has no vector {number}, or is no object")
        fields = cast("dict[str, Any]", rule)
        if unknown := fields.keys() - {"site", "layer", "head", "how", "at", "dose"}:
            raise wrong(f"edit {number}: unknown field {', '.join(sorted(unknown))}")
        at = fields.get("at", "decision")
        try:
            if not isinstance(at, str):
                start, end = (int(part) for part in at)
                at = (start, end)
            edits.append(Steering(**{**fields, "at": at}, values=vectors[str(number)]))
        except (TypeError, ValueError, UsageError) as error:
            raise wrong(f"edit {number}: {error}") from None
    return tuple(edits)
