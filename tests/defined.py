"""Rows of a run held to the definitions of their measures."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from probe.analyzers.registry import REGISTRY
from probe.runs import AXES


def check_defined(
    measures: pd.DataFrame, analyzer: str, absent: Mapping[tuple[str, str], str] | None = None
) -> None:
    """Every row of the analyzer has the unit and the axes of its definition, and every definition has rows.

    `absent`: (name, task or run) → why this run cannot make it.
    """
    rows = measures[measures.analyzer == analyzer]
    yielded = set()
    for (name, whole), group in rows.groupby(["name", rows.task_id == ""]):
        of = "run" if whole else "task"
        defined = REGISTRY.get((analyzer, name))
        assert defined is not None, f"{name} is not defined"
        assert of in defined.of, f"{name} of a {of}"
        assert set(group.unit) == {defined.unit}, name
        used = {axis for axis in AXES if group[axis].notna().any()}
        assert used <= {*defined.columns}, f"{name} of a {of}: {used} and not {defined.axes}"
        always = [axis for axis in defined.axes if not axis.endswith("?")]
        assert group[always].notna().all(axis=None), f"{name} of a {of}: {always}"
        assert group.n.min() >= 1, name
        if defined.interval is None:
            assert group.low.isna().all(), f"{name} has an interval that its definition does not explain"
        yielded.add((name, of))
    registered = {
        (defined.name, of)
        for defined in REGISTRY.values()
        if defined.analyzer == analyzer
        for of in defined.of
    }
    assert registered - yielded == set(absent or {}), (
        f"defined and not made, or made though it is said to be absent: {(registered - yielded) ^ set(absent or {})}"
    )
