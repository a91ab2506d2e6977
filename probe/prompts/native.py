"""A conversation through a chat template that shows tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from probe.prompts.chat import chat
from probe.prompts.codec import Codec
from probe.prompts.labels import tool_of
from probe.prompts.parts import PromptFault, Segment
from probe.prompts.turns import Turns
from probe.tools.definitions import Tool


def shown_natively(
    codec: Codec, turns: Turns, tools: Sequence[Tool], *, open_turn: bool = True
) -> tuple[list[Segment], dict[str, Any]]:
    """Segments of a conversation through a template that shows tools, and how they were rendered.

    Raises PromptFault where the template does not show all of them, and as `chat`.
    """
    segments, record = chat(codec, turns, tools, open_turn=open_turn)
    labels = {tool_of(segment.label) for segment in segments}
    if hidden := [tool.name for tool in tools if tool.name not in labels]:
        names = ", ".join(hidden[:3]) + (", …" if len(hidden) > 3 else "")
        what = f"the chat template leaves out {len(hidden)} of {len(tools)} tools ({names})"
        raise PromptFault(f"{what}: show fewer, or rename them")
    return segments, record
