"""A model's chat template, with the arguments and the date of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from probe.jsontext import printable
from probe.prompts.limits import LimitExceeded, within
from probe.prompts.parts import PromptFault

_DIRECTIVES = [f"%{flag}{letter}" for letter in "aAbBcdeDfFGHIjmMpRSTuUVwWxXyYzZ" for flag in ("", "-")]
_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "conversation"})
"""What a template is given by whoever renders it, or by this class."""
_TOOLS = ("xml_tools",)
"""Other names that templates have for the tools."""


_SECONDS = 10.0
"""Time of one rendering; that of a long conversation takes hundredths of a second."""
_CHARACTERS = 2**24
_SOURCE_CHARACTERS = 2**20


def _fault_of(source: str) -> str | None:
    """Why a template is not even compiled: what it says can take any time there, where nothing ends it."""
    if len(source) > _SOURCE_CHARACTERS:
        return f"it has {len(source)} characters, more than {_SOURCE_CHARACTERS}"
    if "**" in source:
        import jinja2

        try:
            tokens = list(jinja2.Environment().lex(source))
        except jinja2.TemplateError:
            return None  # transformers says so
        if any(kind == "operator" and text == "**" for _, kind, text in tokens):
            return "it raises a number to a power, which no chat template needs"
    return None


class ChatTemplate:
    """Renders conversations exactly as transformers does; false where the tokenizer has no template.

    `arguments` are variables of the template (`enable_thinking`). A template that asks for the date gets `date`,
    so that a prompt can be rendered again on another day. One that has another name for the tools (SmolLM3: `xml_tools`) gets
    them under both.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None, date: str | None = None):
        """Raises PromptFault for an argument that the template never mentions."""
        self._tokenizer, self._arguments = tokenizer, dict(arguments or {})
        template = getattr(tokenizer, "chat_template", None)
        parts = template.values() if isinstance(template, Mapping) else [template or ""]
        self.source = "\n".join(map(str, parts))
        """Text of the template; of all of them where it has several."""
        self._fault = _fault_of(self.source)
        self._named = {name for name in _TOOLS if name in self.source} - self._arguments.keys()
        self._now = datetime.fromisoformat(date) if date else None
        for name in self._arguments:
            if name in _OURS or not re.search(rf"\b{re.escape(name)}\b", self.source):
                what = "is given by probe itself" if name in _OURS else "does not stand in the chat template"
                raise PromptFault(
                    f"--template-arg {printable(name)}: {what}: take it out, or correct its name"
                )

    def __bool__(self) -> bool:
        return bool(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        open_turn: bool = True,
    ) -> str:
        """The text of a conversation, up to the assistant's turn with `open_turn`.

        Raises PromptFault with the template's own words.
        """
        if self._fault is not None:
            raise PromptFault(f"the chat template is not run: {self._fault}")
        try:
            text = within(
                _SECONDS,
                lambda: self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,
                    chat_template=self._dated(self._tokenizer.get_chat_template(None, tools or None)),
                    tokenize=False,
                    add_generation_prompt=open_turn,
                    **(dict.fromkeys(self._named, tools) if tools else {}),
                    **self._arguments,
                ),
            )
        except LimitExceeded as error:
            # A template that loops once is not waited for again.
            self._fault = f"it has not come to an end within {_SECONDS:g} seconds"
            raise PromptFault(f"the chat template cannot render it: {self._fault}") from error
        except MemoryError as error:
            raise PromptFault("the chat template cannot render it: it takes too much memory") from error
        except Exception as error:  # whatever somebody else's template raises
            words = printable(str(error), 300) or type(error).__name__
            raise PromptFault(f"the chat template cannot render it: {words}") from error
        if len(text) > _CHARACTERS:
            raise PromptFault(f"the chat template makes {len(text)} characters of it: {_CHARACTERS} at most")
        return text

    def _dated(self, source: str) -> str:
        """The template with a clock of its own in front: transformers' clock cannot be replaced by an argument."""
        if self._now is None or "strftime_now" not in source:
            return source
        # "%%" is put aside, so that what it leaves is no directive.
        shown = {"%%": "\0", **{d: self._now.strftime(d) for d in _DIRECTIVES}, "\0": "%"}
        replaced = "".join(f"|replace({json.dumps(d)}, {json.dumps(text)})" for d, text in shown.items())
        # The line's end is trimmed with the block before it, so that the source begins a line as it did.
        return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{source}"
