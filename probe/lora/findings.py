"""What the trainings of a sweep say."""

from __future__ import annotations

from typing import Any


def findings(sweep: Any, low: int | None = None) -> dict[str, Any]:
    return {"chosen": {method: sweep.chosen(method) for method in sweep.setting.methods()}}
