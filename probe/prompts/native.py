"""A conversation through a chat template that shows tools."""

from __future__ import annotations

from collections.abc import Sequence

from probe.prompts.codec import Codec
from probe.prompts.labels import tool_of
from probe.prompts.parts import PromptFault, Segment
from probe.prompts.places import Turns, placed
from probe.tools.definitions import Tool


def shown_natively(codec: Codec, turns: Turns, tools: Sequence[Tool]) -> list[Segment]:
    """Segments of a conversation through a template that shows tools.

    Raises PromptFault where the template does not show all of them, and as `placed`.
    """
    segments = placed(codec, turns, tools)
    labels = {tool_of(segment.label) for segment in segments}
    if hidden := [tool.name for tool in tools if tool.name not in labels]:
        names = ", ".join(hidden[:3]) + (", …" if len(hidden) > 3 else "")
        what = f"the chat template leaves out {len(hidden)} of {len(tools)} tools ({names})"
        raise PromptFault(f"{what}: show fewer, or rename them")
    return segments
