"""Chat templates of many makes: what transformers renders is what the model is shown, and its texts are found in it.

The templates are written for these tests, each with what one family of public templates does.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache

import pytest
from click.testing import CliRunner

import probe
from probe.cli import main
from probe.errors import RunDirectoryError, UsageError
from probe.experiments import intervene
from probe.harness.plan import Options, TaskPlan, codec_of, make_options, notices, template_arguments
from probe.model.shapes import byte_tokenizer
from probe.prompts import Codec, Prompt, PromptFault, places, reply_ids, template
from probe.prompts.calls import assistant_calls, call_format
from probe.prompts.places import schema_of
from probe.tasks import AgentTask, Message, PromptingTask, ToolTask, Variant, render
from probe.tasks.agent import Episode
from probe.tasks.tool_selection import read_call
from probe.tools.calls import spoken_from
from probe.tools.definitions import Tool
from tests.each import each

_JSON_CALL = (
    '{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments if c.function.arguments is string'
    " else c.function.arguments | tojson) + '}"
)
_TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def _chatml(tools: str, call: str, other: str = _TURN, end: str = _OPEN) -> str:
    calls = (
        "{{ '<|im_start|>assistant\\n' }}{% for c in m.tool_calls %}"
        + call
        + "{% endfor %}{{ '<|im_end|>\\n' }}"
    )
    return (
        "{% if tools %}"
        + tools
        + "{% endif %}{% for m in messages %}{% if m.tool_calls %}"
        + calls
        + "{% else %}"
        + other
        + "{% endif %}{% endfor %}"
        + end
    )


_LISTED = "{{ 'TOOLS' }}{% for t in tools %}{{ '\\n' + (t | tojson) }}{% endfor %}{{ '\\n' }}"
_HERMES_CALL = "{{ '<tool_call>\\n" + _JSON_CALL + "\\n</tool_call>' }}"
TEMPLATES = {
    # Descriptions between quotes that nothing escapes, tools beside the last message, an id of nine characters.
    "mistral": (
        "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == asked[-1] %}{{ '[AVAILABLE_TOOLS] [' }}"
        '{% for t in tools %}{{ \'{"type": "function", "function": {\' }}{% for key, v in t.function.items() %}'
        "{{ '\"' + key + '\": ' + (('\"' + v + '\"') if v is string else (v | tojson)) }}"
        "{{ ', ' if not loop.last }}{% endfor %}{{ '}}' + (', ' if not loop.last else ']') }}{% endfor %}"
        "{{ '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
        "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
        "{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' }}{% endfor %}{{ ']' + eos_token }}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' }}"
        "{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
        "{{ m.tool_call_id + '\"}[/TOOL_RESULTS]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    # Tools as TypeScript, the name in the recipient, results under the name of the tool that was called.
    "harmony": (
        "{{ '<|im_start|>system\\nDate: ' + strftime_now('%Y-%m-%d') + '\\nReasoning: ' + (reasoning_effort or 'medium') }}"
        "{% if tools %}{{ '\\nnamespace functions {\\n' }}{% for t in tools %}{{ '// ' + t.function.description + '\\n"
        "type ' + t.function.name + ' = (_: {' }}{% for name, p in t.function.parameters.properties.items() %}"
        "{{ name + ('' if name in (t.function.parameters.required or []) else '?') + ': ' }}"
        "{% if p.type == 'string' %}{{ 'string' }}{% elif p.enum %}{{ p.enum | map('tojson') | join(' | ') }}"
        "{% else %}{{ 'any' }}{% endif %}{{ ', ' }}{% endfor %}{{ '}) => any;\\n' }}{% endfor %}{{ '}' }}{% endif %}"
        "{{ '<|im_end|>' }}{% set last = namespace(name=none) %}{% for m in messages %}"
        "{% if m.tool_calls %}{% set last.name = m.tool_calls[0].function.name %}"
        "{{ '<|im_start|>assistant to=functions.' + last.name + '<|channel|>json<|message|>' }}"
        "{{ (m.tool_calls[0].function.arguments | tojson) + '<|im_end|>' }}"
        "{% elif m.role == 'tool' %}{% if last.name is none %}{{ raise_exception('no call before the result') }}{% endif %}"
        "{{ '<|im_start|>functions.' + last.name + ' to=assistant<|message|>' + (m.content | tojson) + '<|im_end|>' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '<|message|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    ),
    # Shows tools, and has no way to write a call.
    "lfm2": _chatml(
        "{{ '<|im_start|>system\\nList of tools: <|tool_list_start|>[' }}{% for t in tools %}{{ (t | tojson) + "
        "(', ' if not loop.last else '') }}{% endfor %}{{ ']<|tool_list_end|><|im_end|>\\n' }}",
        "{{ m.content }}",
    )
    + "{# <|tool_call_start|> #}",
    # A thought that is opened for the model and left out of the history; slashes that switch it.
    "nemotron": _chatml(
        "{{ '<AVAILABLE_TOOLS>[' }}{% for t in tools %}{{ t.function | tojson }}{{ ', ' if not loop.last }}"
        "{% endfor %}{{ ']</AVAILABLE_TOOLS>\\n' }}",
        "{{ '<TOOLCALL>[" + _JSON_CALL + "]</TOOLCALL>' }}",
        "{% set text = m.content.split('</think>')[-1] %}"
        "{{ '<|im_start|>' + m.role + '\\n' + text.replace('/no_think', '').strip() + '<|im_end|>\\n' }}",
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
    ),
    # The name of the tool is in the id of the call alone.
    "kimi": _chatml(
        _LISTED, "{{ '<|call|>' + c.id + '<|args|>' + (c.function.arguments | tojson) + '<|end|>' }}"
    ),
    # Arguments must be a text.
    "deepseek": _chatml(
        _LISTED, "{{ '<|calls|>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```' }}"
    ),
    # Quotes results, leaves thoughts out of the history, says nothing where the system text is empty.
    "looks": _chatml(
        _LISTED,
        _HERMES_CALL,
        "{% if m.role == 'tool' %}{{ '<|im_start|>tool\\n' + (m.content | tojson) + '<|im_end|>\\n' }}"
        "{% elif m.role == 'system' %}{% if m.content %}" + _TURN + "{% else %}{{ 'NOBODY\\n' }}{% endif %}"
        "{% elif m.role == 'assistant' and '</think>' in m.content %}{{ '<|im_start|>assistant\\n' + "
        "m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}"
        "{% elif m.content.startswith('<tool_response>') %}{{ 'RESULT ' + m.content + '\\n' }}"
        "{% else %}" + _TURN + "{% endif %}",
    ),
}
OPENERS = {
    "mistral": ('[TOOL_CALLS] [{"name": "', '", "arguments": {}'),
    "harmony": (" to=functions.", "<|channel|>json<|message|>{}"),
    "lfm2": ("<|tool_call_start|>[", "("),
    "nemotron": ('\n</think>\n\n<TOOLCALL>[{"name": "', '", "arguments": {}'),
    "kimi": ("<|call|>functions.", ":0<|args|>{}"),
    "deepseek": ("<|calls|>", "\n```json\n{}"),
    "looks": ('<tool_call>\n{"name": "', '", "arguments": {}'),
}
DATE = "2026-02-03T04:05:06"
TOOLS = (
    Tool(
        name="get_heat",
        description='Tells "how warm" a city is, {{ x }}.',
        parameters={
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
        },
    ),
    Tool(name="get_hotel", description="Looks for a room."),
)


@cache
def codec(name: str, n_ctx: int = 8192) -> Codec:
    tokenizer = byte_tokenizer(272)
    tokenizer.chat_template = TEMPLATES[name]
    return Codec(tokenizer, n_ctx, date=DATE)


def written(used: Codec, messages: list[dict[str, str]], tools=()) -> str:
    """What transformers renders, with the date in the template's place."""
    template = str(used.tokenizer.chat_template).replace("strftime_now('%Y-%m-%d')", "'2026-02-03'")
    return used.tokenizer.apply_chat_template(
        messages,
        tools=[schema_of(tool) for tool in tools] or None,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )


def texts(prompt: Prompt, used: Codec, label: str) -> list[str]:
    return [used.decode(prompt.token_ids[s.start : s.end]) for s in prompt.spans if s.label == label]


def without_sink(prompt: Prompt, used: Codec) -> str:
    return prompt.text if prompt.text.startswith("<|im_start|>") else prompt.text.removeprefix("<|bos|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_shows_tools_is_rendered_as_transformers_renders_it(name):
    used = codec(name)
    task = ToolTask(id="t", messages=(Message("user", "How warm is it in Rome?"),), tools=TOOLS)
    (prompt,) = render(task, used, max_new_tokens=8)
    assert prompt.no_tool == "complement"
    assert prompt.template["fallback"] is None
    assert prompt.template.get("assumed_call") == (OPENERS[name][0] if name == "lfm2" else None)
    expected = written(used, [{"role": "user", "content": "How warm is it in Rome?"}], TOOLS)
    assert prompt.text.removeprefix("<|bos|>") == (expected + OPENERS[name][0]).removeprefix("<|bos|>")
    closed = prompt.template.get("closed_thought", "")
    assert closed == ("\n</think>\n\n" if name == "nemotron" else "")
    assert closed + str(prompt.call_prefix) == OPENERS[name][0]
    assert prompt.call_tails["get_hotel"].startswith(OPENERS[name][1])
    assert texts(prompt, used, "user") == ["How warm is it in Rome?"]
    for shown in TOOLS:
        (text,) = texts(prompt, used, f"tool:{shown.name}")
        assert shown.name in text
        assert shown.description in text.replace('\\"', '"')
    assert texts(prompt, used, "tool:get_heat")[0].count("city") >= 1


# What of a definition is rendered, by template and tool; a template that writes JSON writes all of it.
PARTS = {
    "mistral": ("name", "description", "parameters"),
    "harmony": ("description", "name", "parameters"),
    **dict.fromkeys(("lfm2", "nemotron", "kimi", "deepseek", "looks"), ("name", "description", "parameters")),
}


@pytest.mark.parametrize("name", PARTS)
def test_the_parts_of_a_tool_are_found_where_its_texts_stand(name):
    used = codec(name)
    task = ToolTask(id="t", messages=(Message("user", "get_hotel: Looks for a room."),), tools=TOOLS)
    (prompt,) = render(task, used, max_new_tokens=8)
    shown = {key: "".join(part_texts(prompt, used, places)) for key, places in prompt.tool_parts.items()}
    assert [part for label, part in shown if label == "tool:get_heat"] == list(PARTS[name])
    for tool in TOOLS:
        label = f"tool:{tool.name}"
        assert shown[label, "name"] == tool.name
        assert shown[label, "description"].replace('\\"', '"') == tool.description
        assert all(
            span.start <= part.start < part.end <= span.end for span in prompt.spans for part in span.parts
        )
    parameters = shown["tool:get_heat", "parameters"]
    assert parameters.count("city") >= 1 and "Tells" not in parameters
    if name == "harmony":
        assert ("tool:get_hotel", "parameters") not in shown, "what is not rendered is not there"


def part_texts(prompt: Prompt, used: Codec, places) -> list[str]:
    return [used.decode(prompt.token_ids[place.start : place.end]) for place in places]


def test_a_text_that_stands_twice_where_it_can_only_be_searched_for_is_no_part():
    tools = (Tool(name="look", description="Will look."), Tool(name="other", description="Anything."))
    text = "TOOLS look: Will look. other: Anything."
    segments = places._searched(text, [], tools)
    shown = {(s.label, part.part): s.text[part.start : part.end] for s in segments for part in s.parts}
    assert shown == {
        ("tool:look", "description"): "Will look.",
        ("tool:other", "name"): "other",
        ("tool:other", "description"): "Anything.",
    }


AWKWARD = (
    [
        ("user", "Hi"),
        ("assistant", "Let me look."),
        ("tool", '{"temp": 3, "é": "a\\nb"}'),
        ("user", "And Rome?"),
    ],
    [("user", "Hi"), ("assistant", "<think>\nA greeting.\n</think>\n\nHello!"), ("user", "Rome?")],
    [("user", "Hi"), ("assistant", "<think>Two words</think>Hello <b>you</b>!\n"), ("user", "Rome?")],
    [("system", ""), ("user", "Rome?")],
    [("system", "Be kind."), ("user", "Rome?\n /no_think")],
    [("user", "Hi"), ("assistant", "Hi"), ("user", "Hi")],
    [("user", "<tool_response>\n3\n</tool_response>"), ("assistant", "a"), ("user", " \n spaced \n")],
)


@each((name, n) for name in ("looks", "nemotron", "harmony", "kimi") for n in range(len(AWKWARD)))
def test_no_message_changes_the_rendering(case):
    name, number = case
    used, spoken = codec(name), AWKWARD[number]
    messages = [{"role": role, "content": text} for role, text in spoken]
    task = ToolTask(id="t", messages=tuple(Message(*pair) for pair in spoken), tools=TOOLS)
    try:
        expected = written(used, messages, TOOLS)
    except Exception as error:
        with pytest.raises(PromptFault, match=str(error)):
            render(task, used, max_new_tokens=8)
        return
    (prompt,) = render(task, used, max_new_tokens=8)
    closed = prompt.template.get("closed_thought", "")
    assert without_sink(prompt, used) == expected + closed + str(prompt.call_prefix)
    assert prompt.template["fallback"] is None
    last = spoken[-1][1].replace("/no_think", "") if name == "nemotron" else spoken[-1][1]
    assert "".join(texts(prompt, used, "user")).strip().endswith(last.strip())


def test_what_a_template_leaves_out_of_a_message_is_nobodys_text():
    used = codec("looks")
    spoken = AWKWARD[1]
    task = ToolTask(id="t", messages=tuple(Message(*pair) for pair in spoken), tools=TOOLS)
    (prompt,) = render(task, used, max_new_tokens=8)
    assert (texts(prompt, used, "user"), texts(prompt, used, "assistant")) == (["Hi", "Rome?"], ["Hello!"])


def test_special_tokens_in_texts_stay_text_under_a_template_that_looks_into_them():
    for name in ("looks", "harmony", "mistral"):
        used = codec(name)
        end = used.tokenizer.convert_tokens_to_ids("<|im_end|>")
        counts = []
        for text in ("x<|im_end|>y", "xy"):
            tools = (Tool(name="a", description=text), Tool(name="b", description='"'))
            messages = (Message("user", text), Message("assistant", text), Message("user", "go"))
            (prompt,) = render(ToolTask(id="t", messages=messages, tools=tools), used, max_new_tokens=8)
            counts.append(prompt.token_ids.count(end))
            if name != "looks":
                assert text in texts(prompt, used, "tool:a")[0]
        assert counts[0] == counts[1]


def test_a_message_that_cannot_be_rendered_fails_in_the_templates_own_words():
    task = ToolTask(
        id="t", messages=(Message("tool", "3"), Message("user", "And Rome?")), tools=TOOLS, target="get_heat"
    )
    with pytest.raises(PromptFault, match="cannot render it: no call before the result"):
        render(task, codec("harmony"), max_new_tokens=8)


# -- what it writes is read back ----------------------------------------------------------------------------------

_ARGUMENTS = "(c.function.arguments | tojson)"
_EACH = "{% for k, v in c.function.arguments.items() %}"
_PLAIN = "(v if v is string else (v | tojson))"
UNKNOWN = {
    "other keys": "{{ '<call>{\"tool\": \"' + c.function.name + '\", \"args\": ' + " + _ARGUMENTS + " + '}</call>' }}",
    "the id first": "{{ '<%call id=' + c.id + ' fn=' + c.function.name + '%>' + " + _ARGUMENTS + " + '<%end%>' }}",
    "the name in the id": "{{ '<|call|>' + c.id + '<|args|>' + " + _ARGUMENTS + " + '<|end|>' }}",
    "Python": "{{ '<|fn|>' + c.function.name + '(' }}" + _EACH
    + "{{ k + '=' + (v | tojson) + (', ' if not loop.last else '') }}{% endfor %}{{ ')<|/fn|>' }}",
    "an element a value": "{{ '<run>' + c.function.name + '\\n' }}" + _EACH
    + "{{ '<p n=' + k + '>' + " + _PLAIN + " + '</p>\\n' }}{% endfor %}{{ '</run>' }}",
}  # fmt: skip
BACKWARDS = "{{ '<do>' + " + _ARGUMENTS + " + ' with ' + c.function.name + '</do>' }}"


def speaking(call: str, end: str = _OPEN) -> Codec:
    tokenizer = byte_tokenizer(272)
    tokenizer.chat_template = _chatml(_LISTED, call, end=end)
    return Codec(tokenizer, 8192, date=DATE)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "lfm2"])
def test_calls_that_a_template_writes_are_read_back(name):
    written = call_format(codec(name))
    assert written is not None
    assert written.readable
    assert written.lost == ()


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_format_that_nobody_knows_is_learnt_from_the_template_and_read(name):
    used = speaking(UNKNOWN[name])
    task = ToolTask(
        id="t",
        messages=(Message("user", "Rome?"),),
        tools=TOOLS,
        target="get_heat",
        raw={"target": "get_heat"},
    )
    (prompt,) = render(task, used, max_new_tokens=8)
    assert prompt.readable
    assert prompt.template["calls_read"].startswith("as learnt, behind ")
    assert "calls_lost" not in prompt.template
    calls = [("get_heat", {"city": 'Rome "R", {x}', "unit": "C"})]
    message = assistant_calls(calls)
    if name == "the name in the id":
        message["tool_calls"][0]["id"] = "functions.get_heat:3"
    asked = {"role": "user", "content": "Rome?"}
    full = used.template.render([asked, message], [schema_of(tool) for tool in TOOLS], open_turn=False)
    completion = full.partition("assistant\n")[2]
    if name != "the id first":
        assert completion.startswith(str(prompt.call_prefix))
    completion = completion[len(str(prompt.call_prefix)) :]
    read = read_call(prompt, completion, TOOLS)
    assert (read["called"], read["call"]["arguments"]) == calls[0]
    assert "call_error" not in read
    conversation = Episode(agent_task(), agent_prompt(used), {})
    assert conversation.reply(full.partition("assistant\n")[2]).fields["called"] == "get_heat"
    assert "call_error_kind" not in conversation.reply("It is warm.").fields


def agent_task() -> AgentTask:
    return AgentTask(id="a", messages=(Message("user", "Rome?"),), tools=TOOLS)


def agent_prompt(used: Codec) -> Prompt:
    (prompt,) = render(agent_task(), used, max_new_tokens=64)
    return prompt


def test_outputs_of_a_template_whose_calls_cannot_be_read_are_unread_and_that_is_announced():
    used = speaking(BACKWARDS)
    task = ToolTask(id="t", messages=(Message("user", "Rome?"),), tools=TOOLS)
    (prompt,) = render(task, used, max_new_tokens=8)
    assert not prompt.readable
    (told,) = notices([TaskPlan(task, [prompt], [])])
    assert told.startswith("1 of 1 prompts: the chat template writes calls in a way that cannot be read back")
    assert read_call(prompt, '{"city": "Rome"} with get_heat</do>', TOOLS)["call_error_kind"] == "unread"
    for text in ('<do>{"city": "Rome"} with get_heat</do>', "It is warm."):
        reply = Episode(agent_task(), agent_prompt(used), {}).reply(text)
        assert (reply.fields["called"], reply.fields["call_error_kind"]) == (None, "unread")


def test_all_calls_are_recorded_where_a_task_allows_several():
    used = speaking(_HERMES_CALL)
    (prompt,) = render(
        ToolTask(id="t", messages=(Message("user", "Hi"),), tools=TOOLS), used, max_new_tokens=8
    )
    completion = (
        'get_heat", "arguments": {"city": "Rome"}}\n</tool_call>'
        '<tool_call>\n{"name": "get_hotel", "arguments": {}}\n</tool_call>'
    )
    assert read_call(prompt, completion, TOOLS)["call_error_kind"] == "several_calls"
    record = read_call(prompt, completion, TOOLS, several=True)
    assert "call_error" not in record
    assert [call["name"] for call in record["calls"]] == ["get_heat", "get_hotel"]


# -- thoughts -------------------------------------------------------------------------------------------------------

OPENED = {
    "<think>\\n": "\n</think>\n\n",
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "Here are my reasoning steps:\\n": "\n[BEGIN FINAL RESPONSE]\n\n",
    "<think>\\n\\n</think>\\n\\n": "",
    "": "",
}


@pytest.mark.parametrize("shows_tools", [True, False])
@pytest.mark.parametrize("opened", OPENED)
def test_a_call_is_never_put_into_an_open_thought(opened, shows_tools):
    end = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n" + opened + "' }}{% endif %}"
    used = speaking(_HERMES_CALL, end) if shows_tools else plainly(end)
    task = ToolTask(id="t", messages=(Message("user", "What is <think>?"),), tools=TOOLS)
    (prompt,) = render(task, used, max_new_tokens=8)
    head = opened.replace("\\n", "\n")
    assert prompt.text.endswith(f"assistant\n{head}{OPENED[opened]}{prompt.call_prefix}")
    assert prompt.template.get("closed_thought", "") == OPENED[opened]
    free = agent_prompt(used)
    assert free.text.endswith(f"assistant\n{head}")
    assert free.call_lead == OPENED[opened]


def plainly(end: str) -> Codec:
    tokenizer = byte_tokenizer(272)
    tokenizer.chat_template = "{% for m in messages %}" + _TURN + "{% endfor %}" + end
    return Codec(tokenizer, 8192, date=DATE)


def test_an_empty_thought_that_a_template_puts_before_a_call_is_put_there():
    used = speaking("{{ '<think>\\n\\n</think>\\n\\n' }}" + _HERMES_CALL)
    (prompt,) = render(
        ToolTask(id="t", messages=(Message("user", "Hi"),), tools=TOOLS), used, max_new_tokens=8
    )
    assert prompt.template["closed_thought"] == "<think>\n\n</think>\n\n"
    assert prompt.text.endswith('assistant\n<think>\n\n</think>\n\n<tool_call>\n{"name": "')
    assert prompt.call_prefix == '<tool_call>\n{"name": "'


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("Hello.", False, 0),
        ("<think>a</think>\n\nHello.", False, 18),
        ("a</think>\n\nHello.", True, 11),
        ("a", True, None),
        ("<think>a", False, None),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final", False, 56),
    ],
)
def test_where_a_turn_speaks(text, thinking, expected):
    assert spoken_from(text, thinking=thinking) == expected


# -- templates that never end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "within 0.2 seconds"),
        ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", ""),
        ("{{ 'x' * 30000000000 }}", "too much memory"),
        ("{{ 'x' * 20000000 }}", ""),
        ("{{ 10 ** 10 ** 9 }}", "to a power"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    ],
)  # fmt: skip
def test_a_template_that_takes_all_time_or_memory_is_a_sentence(monkeypatch, source, told):
    monkeypatch.setattr(template, "_SECONDS", 0.2)
    tokenizer = byte_tokenizer(272)
    tokenizer.chat_template = source
    with pytest.raises(PromptFault, match=told):
        Codec(tokenizer, 8192).template.render([{"role": "user", "content": "Hi"}])
    tokenizer.chat_template = "{{ 'a ** b' }}"
    assert Codec(tokenizer, 8192).template.render([{"role": "user", "content": "Hi"}]) == "a ** b"


# -- the date, and arguments -----------------------------------------------------------------------------------------


def test_a_template_is_told_the_date_of_the_run_in_every_format():
    formats = "%d %b %Y|%H:%M:%S|%A, %-d %B %y|%j|%I %p|100%%|%%d"
    tokenizer = byte_tokenizer(272)
    tokenizer.chat_template = (
        "  {% set now = strftime_now('" + formats + "') %}\n{{ now }}\n  {{ messages[0].content }}"
    )
    used = Codec(tokenizer, 8192, date=DATE)
    task = PromptingTask(id="p", input=(Message("user", "Hi"),), variants=(Variant(name="base"),))
    (prompt,) = render(task, used, max_new_tokens=4)
    assert prompt.text == "<|bos|>" + datetime.fromisoformat(DATE).strftime(formats) + "\n  Hi"


def test_arguments_of_the_template_are_json_or_text():
    given = ["enable_thinking=false", "reasoning_effort=high", 'kinds=["a"]', "equals=a=b", "empty="]
    assert template_arguments(given) == {
        "enable_thinking": False,
        "reasoning_effort": "high",
        "kinds": ["a"],
        "equals": "a=b",
        "empty": "",
    }
    for wrong in (["x"], ["=1"], ["a b=1"], ["a=1", "a=2"]):
        with pytest.raises(UsageError, match="--template-arg"):
            template_arguments(wrong)


def test_an_argument_reaches_the_template_and_one_that_it_does_not_know_is_refused():
    tokenizer = byte_tokenizer(272)
    tokenizer.chat_template = TEMPLATES["harmony"]
    options = Options(template_args=("reasoning_effort=low",), date=DATE)
    task = ToolTask(id="t", messages=(Message("user", "Rome?"),), tools=TOOLS)
    (prompt,) = render(task, codec_of(tokenizer, 8192, options), max_new_tokens=8)
    assert "Reasoning: low" in prompt.text
    for wrong in ("reasoning_efort=low", "messages=[]", "tools=1"):
        with pytest.raises(UsageError, match="--template-arg"):
            codec_of(tokenizer, 8192, Options(template_args=(wrong,)))


def test_every_run_has_a_date_without_a_zone():
    assert make_options("m", {"date": "2026-02-03"}).date == "2026-02-03T00:00:00"
    assert datetime.fromisoformat(str(make_options("m", {}).date)).tzinfo is None
    with pytest.raises(UsageError, match="--date"):
        make_options("m", {"date": "tomorrow"})


# -- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call_id", "expected"),
    [
        ("looks", None, '<|im_start|>tool\n"3 \\"C\\""<|im_end|>\n<|im_start|>assistant\n'),
        (
            "harmony",
            None,
            '<|im_start|>functions.get_heat to=assistant<|message|>"3 \\"C\\""<|im_end|><|im_start|>assistant',
        ),
        ("mistral", "abc123xyz", '[TOOL_RESULTS] {"content": 3 "C", "call_id": "abc123xyz"}[/TOOL_RESULTS]'),
        ("mistral", None, '[TOOL_RESULTS] {"content": 3 "C", "call_id": "callid002"}[/TOOL_RESULTS]'),
    ],
)
def test_a_result_goes_back_under_the_name_and_the_id_of_its_call(name, call_id, expected):
    used = codec(name)
    task = AgentTask(id="a", messages=(Message("user", "Rome?"),), tools=TOOLS)
    (prompt,) = render(task, used, max_new_tokens=8)
    assert prompt.reply is not None
    assert prompt.reply.name == "tool role"
    ids, _, _ = reply_ids(
        prompt.reply, used, '3 "C"', tool="get_heat", call_id=call_id, number=2, ended_by=None, limit=99
    )
    assert expected in used.decode(ids)
    hostile, _, _ = reply_ids(
        prompt.reply, used, "3", tool="<|im_end|>", call_id=None, ended_by=None, limit=99
    )
    end = used.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert hostile.count(end) == ids.count(end)


def test_results_come_from_the_template_that_the_prompt_came_from():
    tokenizer = byte_tokenizer(272)
    plain = "{% for m in messages %}" + _TURN + "{% endfor %}" + _OPEN
    named = _TURN.replace("m.role + '\\n'", "m.role + ' ' + (m.name or '') + '\\n'")
    tokenizer.chat_template = {"default": plain, "tool_use": _chatml(_LISTED, _HERMES_CALL, named)}
    used = Codec(tokenizer, 8192)
    (prompt,) = render(
        AgentTask(id="a", messages=(Message("user", "Rome?"),), tools=TOOLS), used, max_new_tokens=8
    )
    ids, _, _ = reply_ids(prompt.reply, used, "3", tool="get_heat", call_id=None, ended_by=None, limit=9)  # type: ignore[arg-type]
    assert "<|im_start|>tool get_heat\n3<|im_end|>" in used.decode(ids)


# -- the plain listing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "shown"),
    [
        ({"order": {"type": ["string", "null"], "enum": ["up", None]}}, {"order": "string or null (one of: up, null)"}),
        ({"n": {"enum": [1, True, "x"]}}, {"n": "(one of: 1, true, x)"}),
        ({"c": {"const": 3}}, {"c": "always 3"}),
        ({"l": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}, {"l": "integer or null"}),
        ({"s": {"type": "string", "nullable": True}}, {"s": "string or null"}),
        ({"u": {"$ref": "#/$defs/Unit"}}, {"u": "(one of: km, mi)"}),
        ({"u": {"$ref": "#/$defs/Unit", "description": "unit"}}, {"u": "unit (one of: km, mi)"}),
        ({"t": {"$ref": "#/$defs/Tree"}}, {"t": {"leaf": "string", "below": "Tree"}}),
        ({"t": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}}, {"t": [{"leaf": "string", "below": "Tree"}]}),
        ({"o": {"type": "object", "properties": {"k": {"type": "string"}}}}, {"o": {"k": "string"}}),
        ({"x": {"$ref": "#/$defs/nowhere"}}, {"x": "nowhere"}),
        ({"d": {"type": "string", "description": "a day", "enum": ["Mo", "Tu"]}}, {"d": "a day (one of: Mo, Tu)"}),
    ],
)  # fmt: skip
def test_the_plain_listing_says_what_every_parameter_is(schema, shown):
    tree = {"type": "object", "properties": {"leaf": {"type": "string"}, "below": {"$ref": "#/$defs/Tree"}}}
    definitions = {"Unit": {"enum": ["km", "mi"]}, "Tree": tree}
    assert listed({"type": "object", "properties": schema, "$defs": definitions}) == shown


def listed(parameters) -> dict:
    used = Codec(byte_tokenizer(272), 8192)
    tool = Tool(name="f", parameters=parameters)
    task = ToolTask(id="t", messages=(Message("user", "Rome?"),), tools=(tool,))
    (prompt,) = render(task, used, max_new_tokens=8)
    return json.loads(texts(prompt, used, "tool:f")[0])["parameters"]


def test_the_plain_listing_says_what_a_schema_without_properties_of_its_own_takes():
    by_id = {"type": "object", "properties": {"id": {"type": "string"}}}
    by_name = {"type": "object", "properties": {"name": {"type": "string"}}}
    assert listed({"anyOf": [by_id, by_name]}) == {"anyOf": [{"id": "string"}, {"name": "string"}]}
    assert listed({"allOf": [by_id, by_name]}) == {"id": "string", "name": "string"}
    assert listed({"$ref": "#/$defs/A", "$defs": {"A": by_id}}) == {"id": "string"}


# -- runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_date_and_arguments_and_its_experiments_render_by_them(tmp_path):
    model = probe.load("random:tiny-llama")
    dated = (
        "{{ strftime_now('%d %b %Y') + ' ' + tone }}{% for m in messages %}" + _TURN + "{% endfor %}" + _OPEN
    )
    model.tokenizer.chat_template = dated
    path = tmp_path / "t.jsonl"
    tools = [{"name": "get_heat", "description": "How warm."}, {"name": "get_hotel", "description": "Rooms."}]
    task = {"id": "t", "kind": "tool_selection", "input": "Rome?", "tools": tools, "target": "get_heat"}
    path.write_text(json.dumps(task))
    options = {"template_args": ("tone=kindly",), "date": "2001-02-03", "analyze": False}
    run = probe.run(path, model=model, out=tmp_path / "run", **options)
    assert "03 Feb 2001 kindly" in run["t"].record["prompt"]
    assert run.run["options"]["date"] == "2001-02-03T00:00:00"
    assert run.run["options"]["template_args"] == ["tone=kindly"]
    intervene(run, ["base"], model=model)
    rows = run.table("interventions")
    for entry in run["t"].record["tool_probabilities"]:
        tool = rows["tool"].isna() if entry["tool"] is None else rows["tool"] == entry["tool"]
        assert rows[tool]["log_prob"].item() == pytest.approx(entry["log_prob"], abs=1e-5)
    model.tokenizer.chat_template = dated + " "
    with pytest.raises(RunDirectoryError, match="another chat template"):
        intervene(run, ["base"], model=model)


def test_tasks_without_a_prompt_fail_before_the_others_run_and_fallbacks_are_counted(tmp_path):
    many = [{"name": f"job_{n:03}", "description": "Does a job for the user. " * 5} for n in range(80)]
    tasks = [
        {"id": name, "kind": "tool_selection", "input": "Do it.", "tools": tools, "target": "job_000"}
        for name, tools in (("many", many), ("few", many[:2]))
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, tasks)))
    command = [
        "run",
        str(path),
        "--model",
        "random:tiny-llama",
        "--out",
        str(tmp_path / "run"),
        "--no-analyze",
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    told = " ".join(result.stderr.split())
    assert "many cannot be run: the prompt needs" in told
    assert "of 80 tools fit" in told
    assert "1 of 1 prompts are not as the model's own template writes them" in told
    assert "n = 1, 1 failed and not scored" in told
    assert (
        "the chat template does not show the tools"
        in CliRunner().invoke(main, ["show", str(tmp_path / "run")]).stdout
    )
    assert CliRunner().invoke(main, [*command[:4], "--dry-run", "--limit", "1"]).exit_code == 1
    assert CliRunner().invoke(main, [*command, "--template-arg", "nope=1"]).exit_code in (2, 4)
