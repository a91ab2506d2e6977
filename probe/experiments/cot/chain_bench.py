"""What the experiments on chains of thought share: the loaded run and the effort asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.experiments.loaded_run import LoadedRun
    from probe.experiments.tool.conditions import Effort
    from probe.model.hooked import Model
    from probe.prompts import Codec

Row = dict[str, Any]
"""Row of reasoning.parquet, without its `task_id`."""


@dataclass(frozen=True)
class ChainBench:
    """A run whose model is loaded when it is first needed, and the effort asked for."""

    opened: LoadedRun
    effort: Effort

    @property
    def model(self) -> Model:
        return self.opened.model

    @property
    def codec(self) -> Codec:
        return self.opened.codec

    @property
    def max_new_tokens(self) -> int:
        return self.opened.max_new_tokens("cot")
