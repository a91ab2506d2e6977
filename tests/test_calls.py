"""Calls read from text in every format, broken and hostile text, and what is wrong with a call."""

from __future__ import annotations

import json
import keyword
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.tools.calls import KINDS, MAX_PYTHON, judge, learn, opened_thought, read_calls, unread
from probe.tools.definitions import Tool

WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city"],
    },
)
CLOCK = Tool(name="get_time", parameters={"type": "object", "properties": {}})
TOOLS = (WEATHER, CLOCK)

PARIS = ("get_weather", {"city": "Paris", "days": 2})
ROME = ("get_weather", {"city": "Rome"})
TIME = ("get_time", {})

# As the model families document them: Qwen2.5 and Hermes, SmolLM2, Llama 3.1 to 3.3, Mistral's instruct tokenizers
# v3 and v11, Gemma 3, Llama 4, Qwen3-Coder, OpenAI; behind those, what the templates and model cards of the named
# families write.
DOCUMENTED = {
    "hermes": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        [PARIS, ROME],
    ),
    "hermes after a thought": (
        '<think>\nShould I write {"name": "get_time", "arguments": {}}?\n</think>\n\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
        [ROME],
    ),
    "smollm2": (
        '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}, '
        '{"name": "get_time", "arguments": {}}]</tool_call>',
        [PARIS, TIME],
    ),
    "llama 3": ('{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}<|eot_id|>', [PARIS]),
    "llama 3 with a mark": (
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Rome"}}<|eom_id|>',
        [ROME],
    ),
    "llama 3, several": (
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome"}}; '
        '{"name": "get_time", "parameters": {}}',
        [ROME, TIME],
    ),
    "llama 3, a built-in tool": (
        '<|python_tag|>brave_search.call(query="weather in Rome")<|eom_id|>',
        [("brave_search.call", {"query": "weather in Rome"})],
    ),
    "llama 3.1, tags": ('<function=get_weather>{"city": "Rome"}</function>', [ROME]),
    "mistral v3": (
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}, "id": "VvvODy9mT"}, '
        '{"name": "get_time", "arguments": {}, "id": "aaaaaaaaa"}]</s>',
        [PARIS, TIME],
    ),
    "mistral v11": (
        '[TOOL_CALLS]get_weather[CALL_ID]VvvODy9mT[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]get_time[ARGS]{}</s>',
        [PARIS, TIME],
    ),
    "mistral without [ARGS]": ('[TOOL_CALLS]get_weather{"city": "Rome"}', [ROME]),
    "gemma, code": ('```tool_code\nget_weather(city="Paris", days=2)\n```', [PARIS]),
    "gemma, printed code": (
        "```tool_code\nprint(get_weather(city='Rome'))\nprint(get_time())\n```",
        [ROME, TIME],
    ),
    "gemma, json": ('```json\n{"name": "get_weather", "parameters": {"city": "Rome"}}\n```', [ROME]),
    "llama 4": ('[get_weather(city="Paris", days=2), get_time()]<|eot|>', [PARIS, TIME]),
    "llama 4 with marks": ("<|python_start|>[get_weather(city='Rome')]<|python_end|><|eot|>", [ROME]),
    "one python call": ('get_weather(city="Paris", days=2)\n', [PARIS]),
    "qwen3-coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=get_time>\n</function>\n</tool_call>",
        [PARIS, TIME],
    ),
    "openai": (
        '{"id": "c1", "type": "function", "function": {"name": "get_weather", '
        '"arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 2}"}}',
        [PARIS],
    ),
    "openai, an object": (
        'Calling now.\n[{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]',
        [ROME],
    ),
    "lfm2": ('<|tool_call_start|>[get_weather(city="Paris", days=2)]<|tool_call_end|>', [PARIS]),
    "glm-4.5": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        [PARIS],
    ),
    "glm-4.6": (
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>da"
        "ys</arg_key><arg_value>2</arg_value></tool_call>",
        [PARIS],
    ),
    "harmony": (
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": '
        '"Paris", "days": 2}<|call|>',
        [PARIS],
    ),
    "harmony, the recipient first": (
        '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"ci'
        'ty": "Paris", "days": 2}<|call|>',
        [PARIS],
    ),
    "deepseek-v3": (
        "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>get_weather\n```json\n"
        '{"city": "Paris", "days": 2}\n```<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>',
        [PARIS],
    ),
    "deepseek-v3.1": (
        '<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>get_weather<\uff5ctool\u2581sep\uff5c>{"city": "Paris", "day'
        's": 2}<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>',
        [PARIS],
    ),
    "deepseek-v3.2": (
        '<\uff5cDSML\uff5cfunction_calls>\n<\uff5cDSML\uff5cinvoke name="get_weather">\n'
        '<\uff5cDSML\uff5cparameter name="city" string="true">Paris</\uff5cDSML\uff5cparameter>\n'
        '<\uff5cDSML\uff5cparameter name="days" string="false">2</\uff5cDSML\uff5cparameter>\n</\uff5cDSML\uff5cinvoke>\n'
        "</\uff5cDSML\uff5cfunction_calls>",
        [PARIS],
    ),
    "functiongemma": (
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:2}<end_function_call>",
        [PARIS],
    ),
    "gemma 4": ('<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>', [PARIS]),
    "command-r": (
        'Action: ```json\n[\n    {\n        "tool_name": "get_weather",\n        "parameters": {\n'
        '            "city": "Paris",\n            "days": 2\n        }\n    }\n]```',
        [PARIS],
    ),
    "command-a": (
        "<|START_ACTION|>[\n"
        '    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"'
        ', "days": 2}}\n'
        "]<|END_ACTION|>",
        [PARIS],
    ),
    "kimi-k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_ar"
        'gument_begin|>{"city": "Paris", "days": 2}<|tool_call_end|><|tool_calls_section_end|'
        ">",
        [PARIS],
    ),
    "minimax-m1": (
        '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_calls>',
        [PARIS],
    ),
    "minimax-m2": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n'
        '<parameter name="city">Paris</parameter>\n<parameter name="days">2</parameter>\n'
        "</invoke>\n</minimax:tool_call>",
        [PARIS],
    ),
    "react": (
        'Thought: I need it.\nAction: get_weather\nAction Input: {"city": "Paris", "days": 2}\nObservation:',
        [PARIS],
    ),
    "smolagents": (
        'Thought: I will ask.\nCode:\n```py\nweather = get_weather(city="Paris", days=2)\n'
        "print(weather)\n```<end_code>",
        [PARIS],
    ),
    "smolagents, in tags": (
        'Thought: I will ask.\n<code>\nweather = get_weather(city="Paris", days=2)\nprint(weather)\n</code>',
        [PARIS],
    ),
    "anthropic xml": (
        '<function_calls>\n<invoke name="get_weather">\n'
        '<parameter name="city">Paris</parameter>\n<parameter name="days">2</parameter>\n'
        "</invoke>\n</function_calls>",
        [PARIS],
    ),
    "anthropic xml, the first": (
        "<function_calls>\n<invoke>\n<tool_name>get_weather</tool_name>\n<parameters>\n"
        "<city>Paris</city>\n<days>2</days>\n</parameters>\n</invoke>\n</function_calls>",
        [PARIS],
    ),
    "nemotron": (
        '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]</TOOLCALL>',
        [PARIS],
    ),
    "granite 20b": (
        '<function_call> {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}',
        [PARIS],
    ),
    "phi, firefunction": (
        'functools[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]',
        [PARIS],
    ),
    "internlm2": (
        "<|action_start|><|plugin|>\n"
        '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}<|action_end|>',
        [PARIS],
    ),
    "seed-oss": (
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n"
        "<parameter=days>2</parameter>\n</function>\n</seed:tool_call>",
        [PARIS],
    ),
    "hunyuan": (
        '<tool_calls>\n<tool_call>get_weather\n```json\n{"city": "Paris", "days": 2}\n```\n'
        "</tool_call>\n</tool_calls>",
        [PARIS],
    ),
    "apertus": ('<|tools_prefix|>[{"get_weather": {"city": "Paris", "days": 2}}]<|tools_suffix|>', [PARIS]),
    "xlam": ('{"tool_calls": [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]}', [PARIS]),
    "glm-4": ('get_weather\n{"city": "Paris", "days": 2}', [PARIS]),
    "functionary": ('>>>get_weather\n{"city": "Paris", "days": 2}', [PARIS]),
    "olmo 3": ('<function_calls>\nget_weather(city="Paris", days=2)\n</function_calls>', [PARIS]),
    "minicpm 3": (
        '<|tool_call_start|>\n```python\nget_weather(city="Paris",days=2)\n```\n<|tool_call_end|>',
        [PARIS],
    ),
    "qwen-agent": (
        '\u273fFUNCTION\u273f: get_weather\n\u273fARGS\u273f: {"city": "Paris", "days": 2}',
        [PARIS],
    ),
    "nexusraven": ('get_weather(city="Paris", days=2);', [PARIS]),
    "hermes after a thought that the prompt opened": (
        "Maybe get_time? </think>\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>',
        [PARIS],
    ),
    "hyphens in the name": ("[get-weather(city='Rome')]", [("get-weather", {"city": "Rome"})]),
}


def pairs(text: str, **more) -> list[tuple]:
    return [(call.name, call.arguments) for call in read_calls(text, **more)]


@pytest.mark.parametrize("text,expected", DOCUMENTED.values(), ids=DOCUMENTED)
def test_every_documented_format_is_read(text, expected):
    calls = read_calls(text)
    assert [(call.name, call.arguments) for call in calls] == expected
    assert all(call.error is None and call.message is None and call.complete for call in calls)
    assert [text[call.start : call.end] for call in calls] == [call.text for call in calls]
    assert all(a.end <= b.start for a, b in zip(calls, calls[1:], strict=False))


@pytest.mark.parametrize("text", [text for text, _ in DOCUMENTED.values()], ids=DOCUMENTED)
def test_a_call_cut_anywhere_is_either_whole_or_an_error_or_not_begun(text):
    whole = read_calls(text)
    for end in range(len(text)):
        calls = read_calls(text[:end])
        for call in calls[:-1]:
            assert call in whole
        if calls and calls[-1].error is None:
            # Python's parser sees a whole call where only the end of a longer number or list is missing.
            assert calls[-1] in whole
        elif calls:
            assert calls[-1].error == "not_json"
            assert not calls[-1].complete
            assert calls[-1].message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot do that.",
        "The function returns {'name': 'x'}.",
        '{"name": "Ada", "age": 36}',
        'Her record is {"name": "Ada Lovelace", "born": ',
        '{"city": "Paris"}',
        '[1, 2, {"a": {"b": []}}]',
        '{"arguments": {"city": "Paris"}}',
        '{"name": 3, "arguments": {}}',
        '{"name": "get_time", "description": "The time.", "parameters": {"type": "object", "properties": {}}}',
        '{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}',
        "I would use [get_weather(city='Paris')] if I could.",
        "[see above](https://example.org) and [get_weather](x)",
        "[f(x)](https://example.org)",
        "print(1)",
        "f(x)",
        "get_time() gives the time.",
        '<think>{"name": "get_time", "arguments": {}}',
        "[[[[",
        '{"a": {"b": {"c": ',
    ],
)
def test_what_is_no_call_is_none(text):
    assert read_calls(text) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"name": "get_weather", "arguments": {"city": "Par', "get_weather"),
        ('{"name": "get_weather", "arguments": {"city": }}', "get_weather"),
        ('{"name": "get_weather", "argum', "get_weather"),
        ('{"name": "get_wea', None),
        ('{"type": "function", "function": {"name": "get_weather", "arguments": {', "get_weather"),
        ('{"name": "get_weather", "arguments": {"days": NaN}}', "get_weather"),
        ('{"name": "get_weather", "arguments": {"days": -Infinity}}', "get_weather"),
        ('{"name": "get_weather", "arguments": {"days": 1e999}}', "get_weather"),
        ('{"name": "get_weather", "arguments": {"days": ' + "9" * 5000 + "}}", "get_weather"),
        ('{"name": "get_weather", "arguments": {"city": "a", "city": "b"}}', "get_weather"),
        ('{"name": "get_weather", "arguments": {"city": "\\ud800"}}', "get_weather"),
        ('{"name": "get_weather", "arguments": ["Paris"]}', "get_weather"),
        ('{"name": "get_weather", "arguments": "Paris"}', "get_weather"),
        ('{"name": "get_weather", "arguments": ' + "[" * 70 + "]" * 70 + "}", "get_weather"),
        ("<tool_call>", None),
        ("<tool_call>get the weather</tool_call>", None),
        ("<|python_tag|>import math\nprint(math.pi)", None),
        ('[TOOL_CALLS]get_weather[ARGS]{"city": ', "get_weather"),
        ("[TOOL_CALLS] get_weather", None),
        ('```tool_code\nget_weather("Paris")\n```', "get_weather"),
        ("```tool_code\nx = 3\n```", None),
        ('[get_weather(city="Pa', "get_weather"),
        ("<|python_start|>[get_weather(city=place)]", "get_weather"),
        ("<|python_start|>[get_weather(city=open('/etc/passwd').read())]", "get_weather"),
        ("<|python_start|>[get_weather(days=2**9)]", "get_weather"),
        ("<|python_start|>[get_weather(days=1e999)]", "get_weather"),
        ("<|python_start|>[get_weather(city=b'Paris')]", "get_weather"),
        ("<|python_start|>[get_weather(city={1, 2})]", "get_weather"),
        ("<|python_start|>[get_weather(city='a', city='b')]", "get_weather"),
        ("<|python_start|>[get_weather(city='a\x00b')]", "get_weather"),
        ("<|python_start|>[get_weather(**{})]", "get_weather"),
        ("<function=get_weather><parameter=city>Paris</parameter>", "get_weather"),
        ("<function=get_weather><parameter=city>Paris</function>", "get_weather"),
        (
            "<function=get_weather><parameter=a>1</parameter><parameter=a>2</parameter></function>",
            "get_weather",
        ),
        ("<function=get_weather", None),
    ],
)
def test_a_broken_call_is_a_call_that_says_so(text, name):
    (call,) = read_calls(text)
    assert (call.name, call.arguments, call.error) == (name, None, "not_json")
    assert call.message
    assert "\n" not in call.message
    assert text[call.start : call.end] == call.text


def test_a_broken_call_hides_neither_what_is_before_it_nor_what_is_after():
    text = (
        '<tool_call>{"name": "a", "arguments": {}}</tool_call> and <tool_call>{"name": "b", "arguments": {</tool_call>'
        ' and <tool_call>{"name": "c", "arguments": {"x": "</tool_call>"}}</tool_call>'
    )
    assert [(call.name, call.error) for call in read_calls(text)] == [
        ("a", None),
        ("b", "not_json"),
        ("c", None),
    ]


@pytest.mark.parametrize(
    "text",
    [
        '<think>I could write <tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call> here',
        '<think>{"name": "get_time", "arguments": {}}</think>It is late.',
        '[THINK]get_time: {"name": "get_time", "arguments": {}}[/THINK]It is late.',
        '<|START_THINKING|>{"name": "get_time", "arguments": {}}<|END_THINKING|>It is late.',
        '<|channel|>analysis<|message|>{"name": "get_time", "arguments": {}}<|end|>It is late.',
        'Perhaps {"name": "get_time", "arguments": {}}.\n</think>\n\nIt is late.',
    ],
)
def test_what_is_considered_in_a_thought_is_no_call(text):
    assert read_calls(text, tools=TOOLS) == []
    assert unread(text, TOOLS) is None


def test_a_thought_that_the_prompt_opened_is_one_until_it_is_closed():
    call = '{"name": "get_time", "arguments": {}}'
    assert read_calls(call, thinking=True) == []
    assert pairs(f"{call}</think>{call}", thinking=True) == [TIME]
    assert opened_thought("<|im_start|>assistant\n<think>\n")
    assert not opened_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opened_thought("Think in <think> tags. <|im_start|>assistant\n")


def test_values_without_a_name_and_programs_are_read_where_the_tools_are_known():
    assert pairs('[get_weather("Paris", 2)]', tools=TOOLS) == [PARIS]
    program = "Code:\n```py\nfor city in ['Rome']:\n    pass\nprint(get_weather('Paris', days=2), len('x'))\n```<end_code>"
    assert pairs(program, tools=TOOLS) == [PARIS]
    assert pairs("```python\nx = get_weather('Rome')\n```", tools=TOOLS) == [ROME]
    assert pairs("```python\nx = len('Rome')\n```", tools=TOOLS) == []
    (computed,) = read_calls("Code:\n```py\nget_weather(city=where)\n```", tools=TOOLS)
    assert (computed.name, computed.error) == ("get_weather", "not_json")


@pytest.mark.parametrize(
    "text",
    [
        "<<api_call: get_weather>>",
        '<|run_function|>get_weather::{"city": "Rome"}',
        "[FUNC_BEGIN] get_weather city=Rome [FUNC_END]",
        'Tool: get_weather {city: "Rome"}',
        '<get_weather city="Rome"/>',
    ],
)
def test_a_call_in_no_known_format_is_unread(text):
    assert read_calls(text, tools=TOOLS) == []
    assert unread(text, TOOLS)
    assert judge([], TOOLS, unread=unread(text, TOOLS)).error == "unread"


@pytest.mark.parametrize(
    "text", ["", "It is late.", "The weather is fine: 1 < 2, a > b.", "I need get_weather, but have no city."]
)
def test_an_answer_is_not_unread(text):
    assert unread(text, TOOLS) is None


@pytest.mark.parametrize(
    "rendered",
    [
        '<<call sample>>{"alpha": "north", "beta": "south"}<</call>>\n',
        "<|use|>sample<|with|><k>alpha</k><v>north</v><k>beta</k><v>south</v><|done|>",
        "\u25c6sample\u25c6\n- alpha := north;\n- beta := south;\n\u25c6end\u25c6",
        "RUN sample\nalpha=north\nbeta=south\nSTOP\n",
    ],
    ids=["json", "tags", "lines", "words"],
)
def test_what_a_template_writes_is_read_back(rendered):
    arguments = {"alpha": "north", "beta": "south"}
    dialect = learn(rendered, "sample", arguments)
    assert dialect is not None
    assert pairs(rendered, dialect=dialect) == [("sample", arguments)]
    other = rendered.replace("sample", "get_weather").replace("alpha", "city").replace("north", "Rome, Italy")
    twice = other + other
    assert pairs(twice, dialect=dialect) == [("get_weather", {"city": "Rome, Italy", "beta": "south"})] * 2


def test_arguments_without_quotes_have_the_types_of_the_schema():
    text = "<function=f><parameter=a>\n12\n</parameter><parameter=b>\n12\n</parameter><parameter=c>x</parameter></function>"
    tool = Tool(name="f", parameters={"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}})
    assert pairs(text, tools=[tool]) == [("f", {"a": "12", "b": 12, "c": "x"})]
    assert pairs(text) == [("f", {"a": 12, "b": 12, "c": "x"})]


def test_json_words_and_tuples_are_taken_in_python():
    text = "[f(a=true, b=null, c=(1, (2.5, -3)), d={'x': False}, e='it\\'s' ' here', g='''a\n\"b\"''')]"
    expected = {
        "a": True,
        "b": None,
        "c": [1, [2.5, -3]],
        "d": {"x": False},
        "e": "it's here",
        "g": 'a\n"b"',
    }
    assert pairs(text) == [("f", expected)]


# -- round trips -----------------------------------------------------------------------------------------------------

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True).filter(
    lambda name: name != "print" and not keyword.iskeyword(name)
)
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.sampled_from(
        ["</tool_call>", '{"name": "x", "arguments": {}}', "```", "[f(a=1)]", "\\", '"', "<think>"]
    ),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(texts, part, max_size=3),
    max_leaves=8,
)
calls_written = st.lists(st.tuples(names, st.dictionaries(names, values, max_size=3)), min_size=1, max_size=3)


def objects(calls, key="arguments"):
    return [json.dumps({"name": name, key: arguments}, ensure_ascii=False) for name, arguments in calls]


def python(calls):
    return [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]


WRITERS = {
    "hermes": lambda calls: "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects(calls)),
    "smollm2": lambda calls: f"<tool_call>[{', '.join(objects(calls))}]</tool_call>",
    "llama 3": lambda calls: "; ".join(objects(calls, "parameters")),
    "llama 4": lambda calls: f"[{', '.join(python(calls))}]",
    "mistral v3": lambda calls: f"[TOOL_CALLS] [{', '.join(objects(calls))}]",
    "mistral v11": lambda calls: "".join(
        f"[TOOL_CALLS]{name}[ARGS]{json.dumps(given)}" for name, given in calls
    ),
    "gemma": lambda calls: "```tool_code\n" + "\n".join(python(calls)) + "\n```",
    "fenced": lambda calls: (
        "```json\n" + json.dumps([json.loads(o) for o in objects(calls)], indent=2) + "\n```"
    ),
    "openai": lambda calls: json.dumps(
        [
            {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for name, arguments in calls
        ]
    ),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@given(calls=calls_written)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_again(writer, calls):
    text = writer(calls)
    assert pairs(f"I will call it.\n{text}\nThat is all.") == calls


parts = st.sampled_from(
    [*'{}[]()<>"\\=,:` \nf1', "<tool_call>", "<function=", '{"name": "f', "[TOOL_CALLS]", "[f(a="]
)


@given(st.lists(parts, max_size=40).map("".join))
@settings(max_examples=300, deadline=None)
def test_no_text_raises_and_calls_are_in_order(text):
    calls = read_calls(text)
    assert [text[call.start : call.end] for call in calls] == [call.text for call in calls]
    assert all(a.end <= b.start for a, b in zip(calls, calls[1:], strict=False))
    json.dumps([call.arguments for call in calls], allow_nan=False)


# -- hostile texts ---------------------------------------------------------------------------------------------------

HOSTILE = [
    *("[", "{", '{"', '{ "a": ', '{"name": ', '{"name": "', '{"name": "a", "arguments": {"x": ', '{"id": x'),
    *(
        "<tool_call>",
        "<tool_call>{",
        "<tool_call>[",
        "<function=",
        "<function=a>",
        "<|python_tag|>f(",
        "[TOOL_CALLS]",
    ),
    *(
        "[TOOL_CALLS]a[ARGS]{",
        "```tool_code\n",
        "[f(",
        "\n[f(",
        "\n[f(a='",
        "\n[f(a=[",
        "<think>",
        "</parameter>",
        "<invoke name=",
        '<invoke name="a">',
        "<tool_call>a<arg_key>b</arg_key>",
        "<start_function_call>call:a{b:",
        "<start_function_call>call:a",
        "to=functions.a ",
        "Action: a\n",
        "<code>f(",
        "<tool_calls>",
        ">>>a\n",
        "a-",
    ),
    *('{"name": "f", "arguments": {}}', "\n[f(a=1)]", '"', "\\", "\n[ ", "\t"),
]


def seconds(part: str, n: int) -> float:
    """Processor time for n characters, the better of two."""
    text, times = part * (n // len(part)), []
    for _ in range(2):
        start = time.process_time()
        read_calls(text)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("part", HOSTILE)
def test_time_grows_in_proportion_to_the_length(part):
    """Eight times the text: 64 times the time would be quadratic."""
    assert seconds(part, 2**16) < 20 * seconds(part, 2**13) + 0.02


@pytest.mark.parametrize("part", ["[", "{", "<tool_call>[", '{"name": "a", "arguments": {"x": ', "\n[f("])
def test_a_megabyte_of_brackets_is_read_in_seconds(part):
    assert seconds(part, 2**20) < 10


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": ' + "[" * 2**20,
        '{"name": "f", "arguments": ' + '{"a":' * 200_000 + "1" + "}" * 200_001,
        "<|python_start|>[f(a=" + "[" * 2**20 + "]",
        "<|python_start|>[f(a=" + "-" * 2**20 + "1)]",
        "<|python_start|>[f(a=" + "not " * 2**18 + "1)]",
        "<|python_start|>[f(a=g" + "(1)" * 2**18 + ")]",
        "<|python_start|>[f(a='" + "x" * MAX_PYTHON + "')]",
    ],
    ids=["brackets", "objects", "lists", "minus", "not", "chain", "long"],
)
def test_text_that_is_nested_too_deeply_or_too_long_is_an_error(text):
    call = read_calls(text)[0]
    assert (call.name, call.arguments, call.error) == ("f", None, "not_json")


# -- verdicts --------------------------------------------------------------------------------------------------------


def call_text(name: str, arguments: dict) -> str:
    return json.dumps({"name": name, "arguments": arguments})


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (call_text("get_weather", {"city": "Rome"}), None, None),
        (call_text("get_time", {}), None, None),
        ('{"name": "get_time"}', None, None),
        ("It is late.", "no_call", "no call"),
        (call_text("get_time", {}) * 2, "several_calls", "2 calls"),
        ('{"name": "get_weather", "arguments": {"city": ', "not_json", "not complete"),
        (call_text("get_wether", {"city": "Rome"}), "unknown_tool", 'nearest is "get_weather"'),
        ('{"name": "get_wether", "arguments": {"city": ', "unknown_tool", 'nearest is "get_weather"'),
        ("<tool_call>{}</tool_call>", "unknown_tool", "names no tool"),
        (call_text("get_weather", {}), "missing_argument", "city"),
        ('{"name": "get_weather"}', "missing_argument", "city"),
        (call_text("get_weather", {"city": "Rome", "town": "Rome"}), "unexpected_argument", "town"),
        (call_text("get_weather", {"town": "Rome"}), "unexpected_argument", "town"),
        (call_text("get_weather", {"city": 3}), "mistyped_argument", "city"),
        (call_text("get_weather", {"city": "Rome", "days": True}), "mistyped_argument", "days"),
        (call_text("get_weather", {"city": "Rome", "unit": "kelvin"}), "invalid_argument", "unit"),
    ],
)
def test_each_way_of_being_wrong_has_its_kind(text, error, message):
    verdict = judge(read_calls(text), TOOLS)
    assert verdict.error == error
    assert (verdict.message is None) == (error is None)
    assert message is None or message in verdict.message
    assert error is None or error in KINDS
    assert (verdict.call is None) == (error == "no_call")


def test_several_calls_are_right_where_they_are_allowed_and_each_is():
    both = read_calls('[get_weather(city="Rome"), get_time()]')
    assert judge(both, TOOLS).error == "several_calls"
    assert judge(both, TOOLS, several=True).error is None
    wrong = read_calls('[get_weather(city="Rome"), get_weather(days=2), get_time()]')
    assert judge(wrong, TOOLS, several=True).error == "missing_argument"
