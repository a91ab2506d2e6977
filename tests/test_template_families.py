"""Templates of families of models: what a conversation becomes, how a call is written and where its name is scored.

Each is restated in few words, with what that family does and no other: how tools are shown, what stands around a call and its
arguments, what ends a turn, which roles are refused. `python -m benchmarks.templates` asks the same of the originals.
"""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.templates import ASKED, DATE, TALK, TOOLS, findings, tokenizer_of
from probe.model.shapes import byte_tokenizer
from probe.prompts import Codec, PromptFault
from probe.prompts.calls import call_format
from probe.prompts.chat import chat
from probe.prompts.turns import chat_turn
from probe.tasks import Message, ToolTask, render
from probe.tools.calls import read_calls

_JSON_TOOLS = "{% if tools %}{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor %}{% endif %}"


def _turns(
    before: str,
    between: str,
    end: str,
    calls: str,
    result: str = "tool",
    model: str = "assistant",
    say: str = "m.content",
) -> str:
    """Turns `before` role `between` text `end`; `calls` writes those of message m."""
    role = f"('{model}' if m.role == 'assistant' else '{result}' if m.role == 'tool' else m.role)"
    return (
        "{% for m in messages %}{{ '"
        + before
        + "' + "
        + role
        + " + '"
        + between
        + "' }}{% if m.tool_calls %}"
        + calls
        + "{% else %}{{ "
        + say
        + " }}{% endif %}{{ '"
        + end
        + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + before + model + between + "' }}{% endif %}"
    )


def _each(call: str, between: str = "") -> str:
    return (
        "{% for c in m.tool_calls %}"
        + call
        + ("{{ '" + between + "' if not loop.last }}" if between else "")
        + "{% endfor %}"
    )


_NAME, _JSON = "c.function.name", "(c.function.arguments | tojson)"
_ITEMS = "{% for k, v in c.function.arguments.items() %}"
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>\\n\\n", "<|eot_id|>")
_WORDS = "(v if v is string else v | tojson)"

FAMILIES = {
    "Llama 2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}{# </s> #}",
    "Gemma 1 and 2": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "Llama 3.1, JSON": "{{ bos_token }}" + _JSON_TOOLS + _turns(
        *_LLAMA3,
        "{% if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls only') }}{% endif %}"
        + _each("{{ '{\"name\": \"' + " + _NAME + " + '\", \"parameters\": ' + " + _JSON + " + '}' }}"),
        "ipython", say="m.content | trim",
    ),
    "Llama 4, Python": "{{ bos_token }}" + _JSON_TOOLS + _turns(
        "<|header_start|>", "<|header_end|>\\n\\n", "\\n<|eot|>",
        "{{ '[' }}" + _each("{{ " + _NAME + " + '(' }}" + _ITEMS + "{{ k + '=' + (v | tojson) + (', ' if not loop.last else '') }}{% endfor %}{{ ')' }}", ", ") + "{{ ']' }}",
        "ipython",
    ),
    "ToolACE": "{{ bos_token }}" + _JSON_TOOLS + _turns(
        *_LLAMA3,
        "{{ '[' }}" + _each("{{ " + _NAME + " + '(' }}" + _ITEMS + "{{ k ~ '=' ~ v ~ (', ' if not loop.last else '') }}{% endfor %}{{ ')' }}", ", ") + "{{ ']' }}",
        "ipython",
    ),
    "FunctionGemma": "{{ bos_token }}{% for t in tools or [] %}{{ '<start_function_declaration>declaration:' + t.function.name + '{description:<escape>'"
    " + t.function.description + '<escape>,parameters:{' }}{% for k, v in t.function.parameters.properties.items() %}{{ k + ':{type:<escape>' + (v.type | upper) + '<escape>}' }}"
    "{{ ',' if not loop.last }}{% endfor %}{{ '}}<end_function_declaration>' }}{% endfor %}" + _turns(
        "<start_of_turn>", "\\n", "<end_of_turn>\\n",
        _each("{{ '<start_function_call>call:' + " + _NAME + " + '{' }}" + _ITEMS + "{{ k + ':' + ('<escape>' + v + '<escape>' if v is string else v | tojson) + (',' if not loop.last else '') }}"
              "{% endfor %}{{ '}<end_function_call>' }}"),
        "developer", "model",
    ),
    "Phi-4-mini": _JSON_TOOLS + _turns(
        "<|", "|>\\n", "<|end|>\\n", _each("{{ '{\"name\": \"' + " + _NAME + " + '\", \"arguments\": ' ~ c.function.arguments ~ '}' }}", ","),
    ),
    "SmolLM3": "{{ '<|im_start|>system\n' }}{% for t in xml_tools or [] %}{{ (t | string) + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{# <tool_call> #}"
    + _turns("<|im_start|>", "\\n", "<|im_end|>\\n", "{{ m.content or '' }}", "user"),
    "Granite 4": _JSON_TOOLS + _turns(
        "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>\\n",
        _each("{{ '<tool_call>\n{\"name\": \"' + " + _NAME + " + '\", \"arguments\": ' + " + _JSON + " + '}\n</tool_call>' }}", "\\n"),
        "user", say="'<tool_response>\n' + m.content + '\n</tool_response>' if m.role == 'tool' else m.content",
    ),
    "GLM-4.5": "{{ '[gMASK]<sop>' }}" + _JSON_TOOLS + _turns(
        "<|", "|>\\n", "",
        _each("{{ '\n<tool_call>' + " + _NAME + " }}" + _ITEMS + "{{ '\n<arg_key>' + k + '</arg_key>\n<arg_value>' + " + _WORDS + " + '</arg_value>' }}{% endfor %}{{ '\n</tool_call>' }}"),
        "observation",
    ),
    "MiniMax-M2": _JSON_TOOLS + _turns(
        "]~b]", "\\n", "[e~[\\n",
        "{{ '\n<minimax:tool_call>\n' }}" + _each("{{ '<invoke name=\"' + " + _NAME + " + '\">\n' }}" + _ITEMS + "{{ '<parameter name=\"' + k + '\">' + " + _WORDS
              + " + '</parameter>\n' }}{% endfor %}{{ '</invoke>\n' }}") + "{{ '</minimax:tool_call>' }}",
        "tool", "ai",
    ),
    "LFM2.5": "{{ bos_token }}" + _JSON_TOOLS + _turns(
        "<|im_start|>", "\\n", "<|im_end|>\\n",
        "{{ '<|tool_call_start|>[' }}" + _each("{{ " + _NAME + " + '(' }}" + _ITEMS + "{{ k + '=' + (v | tojson) + (', ' if not loop.last else '') }}{% endfor %}{{ ')' }}", ", ")
        + "{{ ']<|tool_call_end|>' }}",
    ),
    "xLAM": _JSON_TOOLS + _turns(
        "<|im_start|>", "\\n", "<|im_end|>\\n",
        "{{ '[' }}" + _each("{{ '{\"name\": \"' + " + _NAME + " + '\", \"arguments\": ' + " + _JSON + " + '}' }}", ", ") + "{{ ']' }}",
    ),
    "Command R7B": "{{ bos_token }}" + _JSON_TOOLS + _turns(
        "<|START_OF_TURN_TOKEN|><|", "_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
        "{{ '<|START_ACTION|>[\n' }}" + _each("{{ '    {\"tool_call_id\": \"' ~ loop.index0 ~ '\", \"tool_name\": \"' + " + _NAME + " + '\", \"parameters\": ' + " + _JSON + " + '}' }}", ",\\n")
        + "{{ '\n]<|END_ACTION|>' }}", "SYSTEM",
    ),
    "Qwen 3.5": _JSON_TOOLS + _turns(
        "<|im_start|>", "\\n", "<|im_end|>\\n",
        "{{ '<think>\n\n</think>\n\n' }}" + _each("{{ '<tool_call>\n<function=' + " + _NAME + " + '>\n' }}" + _ITEMS + "{{ '<parameter=' + k + '>\n' + " + _WORDS
              + " + '\n</parameter>\n' }}{% endfor %}{{ '</function>\n</tool_call>' }}"),
        "user",
    ),
}  # fmt: skip
OPENERS = {
    "Llama 3.1, JSON": '{"name": "',
    "Llama 4, Python": "[",
    "ToolACE": "[",
    "FunctionGemma": "<start_function_call>call:",
    "Phi-4-mini": '{"name": "',
    "SmolLM3": '<tool_call>\n{"name": "',
    "Granite 4": '<tool_call>\n{"name": "',
    "GLM-4.5": "\n<tool_call>",
    "MiniMax-M2": '\n<minimax:tool_call>\n<invoke name="',
    "LFM2.5": "<|tool_call_start|>[",
    "xLAM": '[{"name": "',
    "Command R7B": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "',
    "Qwen 3.5": "<tool_call>\n<function=",
}
LOST = {
    "ToolACE": ("quotes and brackets in a text", "a text that looks like a number"),
    "FunctionGemma": ("nested arguments", "null"),
}
"""What a template writes in a way that nobody can read back: ToolACE's puts no quotes around texts, this FunctionGemma's JSON's
quotes where the format has its own marks."""


@cache
def codec(name: str) -> Codec:
    return Codec(tokenizer_of(byte_tokenizer(272), FAMILIES[name]), 8192, date=DATE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_rendered_read_and_scored_as_transformers_writes_it(name):
    seen = findings(codec(name))
    assert seen.faults == []
    assert seen.call == OPENERS.get(name, "")
    assert seen.shows_tools == (name in OPENERS) and seen.writes_calls == (
        name in OPENERS and name != "SmolLM3"
    )
    assert seen.lost == LOST.get(name, ())


def test_the_token_behind_a_name_is_that_of_a_call_with_arguments():
    """A bracket in one token with what it holds is another token than an empty pair."""
    for name, with_arguments, without in (("LFM2.5", "(city=", "()"), ("FunctionGemma", "{city:", "{}")):
        written = call_format(codec(name))
        assert written is not None
        heat, _ = TOOLS
        assert written.tail_of(heat).startswith(with_arguments)
        assert written.tail.startswith(without)
    tokenizer = tokenizer_of(byte_tokenizer(272), FAMILIES["LFM2.5"])
    tokenizer.add_tokens(["()", "(c"])
    (prompt,) = render(
        ToolTask(id="t", messages=(Message("user", "Hi"),), tools=TOOLS),
        Codec(tokenizer, 8192),
        max_new_tokens=4,
    )
    assert [tokenizer.decode(candidate.token_ids[-1:]) for candidate in prompt.candidates] == ["(c", "("]


def test_what_ends_a_turn_is_found_behind_a_line_break():
    used = codec("Llama 4, Python")
    assert used.tokenizer.convert_tokens_to_ids("<|eot|>") in used.eos_ids


def test_an_object_that_a_template_would_print_in_pythons_way_reaches_it_as_json():
    used = codec("Phi-4-mini")
    turns = [chat_turn(m["role"], m.get("content") or "", m if len(m) > 2 else None) for m in TALK]
    segments, record = chat(used, turns, TOOLS)
    assert '"arguments": {"city": "Rome", "unit": "C"}' in "".join(segment.text for segment in segments)
    assert "arguments as texts" in record["adapted"]


def test_a_word_without_quotes_is_a_text_in_a_call_of_a_shown_tool_alone():
    (call,) = read_calls("[get_heat(city=Rome, unit=C)]", tools=TOOLS)
    assert (call.name, call.arguments, call.error) == ("get_heat", {"city": "Rome", "unit": "C"}, None)
    assert read_calls("[look(city=Rome)]", tools=TOOLS) == []
    (program,) = read_calls("<code>get_heat(city=town)</code>", tools=TOOLS)
    assert program.error == "not_json", "a variable is no text"


@pytest.mark.parametrize(
    ("name", "roles", "told"),
    [
        ("Gemma 1 and 2", ("user", "user"), r"roles must alternate \(message 2, of the role user\)"),
        ("Llama 2", ("user", "assistant", "critic"), r"no critic \(message 3, of the role critic\)"),
    ],
)
def test_a_template_that_raises_names_the_message(name, roles, told):
    with pytest.raises(PromptFault, match=told):
        chat(codec(name), [chat_turn(role, ASKED["content"]) for role in roles])
