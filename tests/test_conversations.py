"""Messages in the whole chat format: what a template is shown is token for token what transformers shows it, every message has its
label, and what a template does not take is said in another way that is recorded."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest

from probe.errors import BadInput
from probe.jsontext import Spot
from probe.model.shapes import byte_tokenizer
from probe.prompts import Codec, Prompt, PromptFault
from probe.tasks import AgentTask, Message, read_tasks, render
from probe.tasks.messages import check_messages
from tests import test_prompts, test_templates
from tests.each import each

# Thoughts behind the last request are kept, results are grouped in a turn of the user, calls are JSON lines.
QWEN3 = """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- "# Tools\\n\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1, multi=true) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.multi and message.role == "user" and message.content is string %}{%- set ns.multi = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}
{%- for message in messages %}{%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
{%- if (message.role == "user") or (message.role == "system" and not loop.first) %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- elif message.role == "assistant" %}{%- set thought = '' %}{%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
{%- if message.tool_calls %}{%- for tool_call in message.tool_calls %}{%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
{%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}{{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
{%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}{%- elif message.role == "tool" %}{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}{%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# Contents may be lists of parts, turns of the model, nothing of tools.
GEMMA3 = (
    "{{ bos_token }}{%- for message in messages -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{%- endif -%}"
    "{{ '<|im_start|>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- elif message['content'] is iterable -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}"
    "{%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>model\\n' }}{%- endif -%}"
)
# One call a message, arguments as an object alone, the role of results is another's.
LLAMA31 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|im_start|>system\\n' }}{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}{{- system + '<|im_end|>' }}"
    "{%- if tools %}{%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{{- '<|im_start|>user\\n' }}"
    "{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}{{- first + '<|im_end|>' }}{%- endif %}"
    "{%- for message in messages %}{%- if not (message.role == 'tool' or 'tool_calls' in message) %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}"
    "{%- elif 'tool_calls' in message %}{%- if message.tool_calls | length != 1 %}"
    "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}{{- '<|im_start|>assistant\\n' }}"
    "{{- '{\"name\": \"' + call.name + '\", ' }}{{- '\"parameters\": ' }}{{- call.arguments | tojson }}{{- \"}\" }}{{- '<|im_end|>' }}"
    "{%- elif message.role == 'tool' %}{{- '<|im_start|>ipython\\n' }}{%- if message.content is mapping %}"
    "{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}{{- '<|im_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Parameters as elements, of an object alone; results in a turn of the user.
QWEN3_CODER = test_templates._chatml(
    "{{ '<|im_start|>system\\n<tools>' }}{% for t in tools %}{{ '\\n<function>\\n<name>' + t.function.name + '</name>\\n"
    "<description>' + t.function.description + '</description>\\n' + (t.function.parameters | tojson) + '</function>' }}"
    "{% endfor %}{{ '</tools><|im_end|>\\n' }}",
    "{{ '<tool_call>\\n<function=' + c.function.name + '>\\n' }}{% for k, v in c.function.arguments | items %}"
    "{{ '<parameter=' + k + '>\\n' + (v | tojson if v is mapping else v | string) + '\\n</parameter>\\n' }}{% endfor %}"
    "{{ '</function>\\n</tool_call>' }}",
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{% else %}" + test_templates._TURN + "{% endif %}",
)
# Roles between marks, the thought of an assistant kept, a developer's message known.
PHI = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|sep|>' }}{% if m.thinking %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls %}{{ '<|tool_call|>[' + (c.function | tojson) + ']<|/tool_call|>' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if tools %}{{ '<|tool|>' + (tools | tojson) + '<|/tool|>' }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|sep|>' }}{% endif %}"
)
TEMPLATES = {
    "qwen2.5": test_prompts.HERMES.replace(
        "{% endif %}{% endfor %}{% if add",
        "{% elif message.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + message.content "
        "+ '\\n</tool_response><|im_end|>\\n' }}{% endif %}{% endfor %}{% if add",
    ),
    "qwen3": QWEN3,
    "qwen3-coder": QWEN3_CODER,
    "gemma3": GEMMA3,
    "llama3.1": LLAMA31,
    "phi": PHI,
    **{
        name: test_templates.TEMPLATES[name]
        for name in ("mistral", "harmony", "nemotron", "kimi", "deepseek")
    },
    "smollm2": None,
}
NATIVE = [name for name in TEMPLATES if name not in ("gemma3", "smollm2")]
TOOLS = test_templates.TOOLS
ID = "abcdef123"
CALLS = [
    {
        "id": ID,
        "type": "function",
        "function": {"name": "get_heat", "arguments": {"city": "Rome", "unit": "C"}},
    }
]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How warm is it in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": ID, "name": "get_heat", "content": '{"warm": 31}'},
    {"role": "assistant", "content": "It is 31 degrees."},
    {"role": "user", "content": "And a room?"},
]


@cache
def codec(name: str, of: str = "byte") -> Codec:
    if of == "byte" and name != "smollm2":
        tokenizer = byte_tokenizer(272)
    else:
        tokenizer = copy.deepcopy(test_prompts.codec("smollm2").tokenizer)
    if TEMPLATES[name] is not None:
        tokenizer.chat_template = TEMPLATES[name]
    return Codec(tokenizer, 8192, date=test_templates.DATE)


def messages(talk: list[dict]) -> tuple[Message, ...]:
    spot = Spot([])
    checked = check_messages(talk, spot)
    assert not spot.faults
    return checked


def prompt_of(used: Codec, talk: list[dict], tools=TOOLS) -> Prompt:
    (prompt,) = render(AgentTask(id="t", messages=messages(talk), tools=tools), used, max_new_tokens=8)
    return prompt


def with_calls(talk: list[dict], **changed: object) -> list[dict]:
    """The talk with something else in its call."""
    out = copy.deepcopy(talk)
    function = out[2]["tool_calls"][0]["function"]
    function |= changed
    return out


def expected(used: Codec, talk: list[dict], tools=TOOLS) -> list[int]:
    text = test_templates.written(used, talk, tools)
    return used.tokenizer(text, add_special_tokens=False)["input_ids"]


def ids_of(prompt: Prompt, used: Codec, wanted: list[int]) -> list[int]:
    """Tokens of the prompt, without the sink in front where the template writes none."""
    return prompt.token_ids if prompt.token_ids[0] == wanted[0] else prompt.token_ids[1:]


def taken(name: str, talk: list[dict]) -> list[dict]:
    """The talk as users of transformers have to write it for this template."""
    if name == "deepseek":
        return with_calls(talk, arguments=json.dumps(CALLS[0]["function"]["arguments"]))
    if name == "kimi":
        talk = copy.deepcopy(talk)
        talk[2]["tool_calls"][0]["id"] = talk[3]["tool_call_id"] = "functions.get_heat:0"
    if name in ("phi", "lfm2"):
        talk = copy.deepcopy(talk)
        talk[2]["content"] = ""
    return talk


@pytest.mark.parametrize("of", ["byte", "smollm2"])
@pytest.mark.parametrize("name", NATIVE)
def test_a_conversation_with_calls_is_token_for_token_what_transformers_makes_of_it(name, of):
    used = codec(name, of)
    prompt = prompt_of(used, TALK)
    wanted = expected(used, taken(name, TALK))
    assert used.decode(ids_of(prompt, used, wanted)) == used.decode(wanted)
    assert ids_of(prompt, used, wanted) == wanted
    assert prompt.template["fallback"] is None and "calls_as_text" not in prompt.template
    shown = {label: test_templates.texts(prompt, used, label) for label in prompt.labels}
    assert [text.strip() for text in shown["user"]] == ["How warm is it in Rome?", "And a room?"]
    (result,) = shown["result"]
    assert "warm" in result and "31" in result and len(result) < 24
    call, said = shown["assistant"]
    assert "Rome" in call and "im_" not in call and said.strip().endswith("It is 31 degrees.")
    assert "get_heat" in call or name == "harmony"
    assert shown.get("system", ["Be brief."]) == ["Be brief."]


VARIANTS = {
    "arguments as a text": [*with_calls(TALK, arguments='{"city": "Rome", "unit": "C"}')],
    "two calls and what was said before": [
        TALK[1],
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [CALLS[0], {**CALLS[0], "id": "abcdef124"}],
        },
        TALK[3],
        {**TALK[3], "tool_call_id": "abcdef124"},
        {"role": "assistant", "content": "31 both times."},
        TALK[5],
    ],
    "a thought": [
        TALK[1],
        {**TALK[2], "content": "", "reasoning_content": "Rome is in Italy.", "thinking": "Rome is in Italy."},
        TALK[3],
    ],
    "a developer and parts": [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "How warm"}, {"type": "text", "text": "is it?"}],
        },
    ],
}


@pytest.mark.parametrize("name", ["qwen3", "phi", "qwen2.5"])
def test_what_a_template_takes_is_given_as_it_is(name):
    used = codec(name, "smollm2")
    for what in ("two calls and what was said before", "a thought"):
        prompt, wanted = prompt_of(used, VARIANTS[what]), expected(used, VARIANTS[what])
        assert used.decode(ids_of(prompt, used, wanted)) == used.decode(wanted), what
        assert ids_of(prompt, used, wanted) == wanted, what
    if name == "qwen3":  # texts of arguments as they are
        compact = with_calls(TALK, arguments='{"city":"Rome"}')
        assert ids_of(prompt_of(used, compact), used, expected(used, compact)) == expected(used, compact)


def test_arguments_that_a_template_would_quote_again_reach_it_as_the_object():
    used = codec("qwen2.5")
    prompt = prompt_of(used, with_calls(TALK, arguments='{"city":"Rome","unit":"C"}'))
    assert ids_of(prompt, used, expected(used, TALK)) == expected(used, TALK)
    assert prompt.template["adapted"] == "arguments as objects"


def test_ids_of_another_length_are_replaced_alike_in_call_and_result():
    used, talk = codec("mistral"), json.loads(json.dumps(TALK).replace(ID, "call_0123456789"))
    prompt = prompt_of(used, talk)
    wanted = expected(used, json.loads(json.dumps(TALK).replace(ID, "callid000")))
    assert ids_of(prompt, used, wanted) == wanted
    assert prompt.template["adapted"] == "ids of calls: nine characters"


def test_a_developer_and_parts_are_shown_as_the_template_knows_them():
    talk = VARIANTS["a developer and parts"]
    for name, role, said in (
        ("phi", "developer", "How warm\nis it?"),
        ("qwen2.5", "system", "How warm\nis it?"),
    ):
        used = codec(name)
        plain = [{"role": role, "content": "Be brief."}, {"role": "user", "content": said}]
        prompt = prompt_of(used, talk)
        assert ids_of(prompt, used, expected(used, plain)) == expected(used, plain)
    used = codec("gemma3")  # it shows no tools: they are listed in front of the request
    (shown,) = [
        text for text in test_templates.texts(prompt_of(used, talk[1:]), used, "user") if "warm" in text
    ]
    assert shown in ("How warmis it?", "How warm\nis it?")


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "llama3.1"])
def test_calls_that_a_template_cannot_show_are_written_as_text(name):
    used = codec(name)
    talk = VARIANTS["two calls and what was said before"]
    prompt = prompt_of(used, talk)
    assert prompt.template["calls_as_text"]
    spoken = test_templates.texts(prompt, used, "assistant")[0]
    said, _, written = spoken.partition("\n")
    assert said == "Let me look."
    calls = json.loads(written.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert [call["arguments"]["city"] for call in calls] == ["Rome", "Rome"]
    assert test_templates.texts(prompt, used, "result") == ['{"warm": 31}'] * 2


def test_the_message_that_cannot_be_rendered_is_named():
    used = codec("gemma3")
    talk = [TALK[1], TALK[1], TALK[4]]
    with pytest.raises(PromptFault, match=r"must alternate.*\(message 2, of the role user\)"):
        prompt_of(used, talk)


def test_a_special_token_in_a_call_or_result_stays_text():
    used = codec("qwen3")
    end = used.tokenizer.convert_tokens_to_ids("<|im_end|>")
    counts = []
    for text in ("<|im_end|>", "xy"):
        talk = with_calls(TALK, arguments={"city": text})
        talk[3]["content"] = text
        counts.append(prompt_of(used, talk).token_ids.count(end))
    assert counts[0] == counts[1]


MISTAKES = {
    "a call outside of a function": (
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]},
        ["tool_calls[0].function: missing"],
    ),
    "arguments that are a list": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": []}}]},
        ["arguments: must be an object or a JSON text, is a list"],
    ),
    "a picture": (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        ['content[0]: is a part of the type "image_url"'],
    ),
    "nothing said": (
        {"role": "assistant", "content": None},
        ["content: must be a string or a list of text parts, is null"],
    ),
    "calls of a user": (
        {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]},
        ['tool_calls: stands in a message of the role "user"'],
    ),
}


@each(MISTAKES.items())
def test_a_message_that_is_none_is_refused(case):
    _, (message, told) = case
    line = {"id": "a", "kind": "agent", "messages": [message], "tools": [{"name": "f"}]}
    with pytest.raises(BadInput) as caught:
        read_tasks(_file(line), None)
    for words in told:
        assert any(words in problem for problem in caught.value.problems), caught.value.problems


def _file(*lines: dict) -> Path:
    import tempfile

    path = Path(tempfile.mkdtemp()) / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
