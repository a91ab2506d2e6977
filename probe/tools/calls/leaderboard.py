"""What the Berkeley Function Calling Leaderboard decodes from what a model wrote, handler by handler.

The rules are those of the handlers of bfcl-eval 2026.3.23, by their class names: `decode_ast`, and before it what a
handler of a local model does to the text. What they decode and what `probe.tools.calls` reads are two questions: a
rule takes `true` in Python for a name, drops values without a name, and fails on a text around the call.
Nothing is evaluated as code: arithmetic in arguments is worked out by simpleeval, without names.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from probe.tools.calls import read_calls
from probe.tools.calls.escaped import escaped_arguments
from probe.tools.calls.python import MAX_PYTHON
from probe.tools.calls.source import java_call, javascript_call

PROMPTED = "default_decode_ast_prompting"
"""The rule for a model that is told in words how to write calls: a Python list."""


@dataclass(frozen=True)
class DecodedCall:
    """One call as the leaderboard decodes it: values are Python's, or source text of Java and JavaScript."""

    name: str
    arguments: dict[Any, Any]


@dataclass(frozen=True)
class Decoding:
    """What a rule makes of a text: calls, or why there are none."""

    calls: tuple[DecodedCall, ...] = ()
    error: str | None = None
    """`decoder_failed` or `decoder_wrong_output_format`; None: it decodes, perhaps to an empty list."""
    message: str | None = None


def decode(text: str, handler: str, language: str = "python") -> Decoding:
    """What a handler's rule decodes; `language` is `python`, `java` or `javascript`. Never raises for a text."""
    try:
        if len(text) > MAX_PYTHON:
            raise ValueError(f"the text has more than {MAX_PYTHON} characters")
        decoded = RULES[handler](text, language)
    # Whatever a rule runs into is a text that cannot be decoded: the leaderboard catches every exception.
    except Exception as error:
        return Decoding(error="decoder_failed", message=f"{handler}: {type(error).__name__}: {error}")
    if not isinstance(decoded, list) or not all(map(_is_call, decoded)):
        message = f"{handler}: {decoded!r} is no list of calls"
        return Decoding(error="decoder_wrong_output_format", message=message)
    return Decoding(tuple(DecodedCall(*next(iter(call.items()))) for call in decoded))


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), dict)


# -- Python ---------------------------------------------------------------------------------------------------------


def _prompted(text: str, language: str) -> Any:
    text = text.strip("`\n ")
    text = text if text.startswith("[") else "[" + text
    return _listed(text if text.endswith("]") else text + "]", language)


def _listed(text: str, language: str) -> Any:
    """The calls in a list, or one call. The brackets are cut off blindly before Java and JavaScript."""
    if language == "java":
        return java_call(text[1:-1])
    if language == "javascript":
        return javascript_call(text[1:-1])
    body = _parse(text.strip().strip("'"))
    return [_call(node) for node in ([body] if isinstance(body, ast.Call) else body.elts)]  # type: ignore[attr-defined]


def _parse(text: str) -> ast.expr:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in strings
        return ast.parse(text, mode="eval").body


def _call(node: ast.expr) -> dict[str, dict]:
    """`{name: arguments}`; values without a name are dropped, the last of two of one name counts."""
    if not isinstance(node, ast.Call):
        raise ValueError(f"{ast.unparse(node)} is no call")
    parts: list[str] = []
    function = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    return {".".join(reversed(parts)): {keyword.arg: _value(keyword.value) for keyword in node.keywords}}  # type: ignore[misc]


def _value(node: ast.expr | None) -> Any:
    match node:
        case ast.Constant():
            return "..." if node.value is Ellipsis else node.value
        case ast.UnaryOp():
            return -node.operand.value  # type: ignore[attr-defined]  # whatever the sign is
        case ast.List():
            return [_value(item) for item in node.elts]
        case ast.Tuple():
            return tuple(_value(item) for item in node.elts)
        case ast.Dict():
            return {_value(key): _value(item) for key, item in zip(node.keys, node.values, strict=True)}
        case ast.BinOp():
            return _worked_out(ast.unparse(node))
        case ast.Name():
            return node.id
        case ast.Call():
            return _call(node) if node.keywords else ast.unparse(node)
        case ast.Subscript():
            return f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]"
    raise ValueError(f"{type(node).__name__} is no value")


def _worked_out(text: str) -> Any:
    """Value of an expression of literals. There Python evaluates it, functions included."""
    from simpleeval import EvalWithCompoundTypes

    functions = {f.__name__: f for f in (abs, float, int, len, max, min, round, str, sum)}
    evaluator = EvalWithCompoundTypes(functions=functions, names={"True": True, "False": False, "None": None})
    forbidden = (ast.Attribute, ast.ListComp, ast.GeneratorExp, ast.DictComp)
    evaluator.nodes = {kind: node for kind, node in (evaluator.nodes or {}).items() if kind not in forbidden}
    return evaluator.eval(text)


# -- marks and JSON -------------------------------------------------------------------------------------------------


def _behind_thought(text: str) -> str:
    return text.split("</think>")[-1].lstrip("\n")


def _thinking(text: str, language: str) -> Any:
    return _prompted(_behind_thought(text), language)


def _by_keys(calls: Any, arguments: str = "arguments") -> list[dict]:
    return [{call["name"]: call[arguments]} for call in calls]


def _blocks(text: str) -> Iterator[str]:
    return (match[1] for match in re.finditer(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL))


def _hermes(text: str, language: str) -> Any:
    """Blocks that are broken are skipped, so that prose is an empty list."""
    decoded = []
    for block in _blocks(text):
        try:
            decoded.append(json.loads(block))
        except ValueError:
            continue
    return [{call["name"]: dict(call["arguments"].items())} for call in decoded]


def _arch(text: str, language: str) -> Any:
    decoded = []
    for block in _blocks(text):
        try:
            decoded.append(json.loads(block))
        except ValueError:
            decoded.append(_worked_out(block))
    if not decoded:
        raise ValueError("there is no call in the text")
    return _by_keys(decoded)


def _items(block: str) -> list[Any]:
    """A block that is a list or becomes one; a text in it is read as Python."""
    if not block.startswith("[") and not block.endswith("]"):
        block = f"[{block}]"
    try:
        listed = json.loads(block)
    except ValueError:
        return [block]
    if not isinstance(listed, list):
        return [listed]
    return [_worked_out(item) if isinstance(item, str) else item for item in listed]


def _calls_of(items: list[Any]) -> Any:
    if not items or not all(isinstance(item, dict) for item in items):
        raise ValueError("there is no call in the text")
    return _by_keys(items)


def _phi(text: str, language: str) -> Any:
    blocks = re.findall(r"<\|tool_call\|>(.*?)<\|/tool_call\|>", text, re.DOTALL)
    blocks = blocks or re.findall(r"<\|tool_call\|>(.*?)(?:<\|/tool_call\|>)?$", text, re.DOTALL)
    return _calls_of([item for block in blocks for item in _items(block)])


def _granite_3(text: str, language: str) -> Any:
    text = re.sub(r"\A[AINST:]*\s*", "", text)
    mark = "<tool_call>" if "<tool_call>" in text else "<|tool_call|>"
    text = text.replace("</tool_call>", "") if mark == "<tool_call>" else text
    block = text.partition(mark)[2]
    return _calls_of(_items(block.strip()) if mark in text else [])


def _granite_20b(text: str, language: str) -> Any:
    decoded: list[Any] = []
    for part in filter(None, (part.strip() for part in text.split("<function_call>"))):
        try:
            call = json.loads(part)
        except ValueError:
            decoded.append(part)
            continue
        name = call.get("name", "").strip()
        decoded.append(
            "No function is called" if name == "no_function" else {name: call.get("arguments", {})}
        )
    return decoded


def _falcon(text: str, language: str) -> Any:
    block = text.split("<tool_call>")[1].split("</tool_call>")[0].strip()
    if block.startswith("```") and block.endswith("```"):
        block = block.strip("`").strip().removeprefix("json").strip()
    calls = json.loads(block)
    return _by_keys(calls if isinstance(calls, list) else [calls])


def _salesforce(text: str, language: str) -> Any:
    try:
        calls = json.loads(text)
    except ValueError:
        calls = [json.loads(part.strip()) for part in text.split(";")]
    return _by_keys(calls if isinstance(calls, list) else [calls])


def _json_alone(text: str, language: str) -> Any:
    calls = json.loads(text)
    return _by_keys(calls if isinstance(calls, list) else [calls])


def _hammer(text: str, language: str) -> Any:
    try:
        calls = json.loads(text.replace("```", ""))
    except ValueError:
        calls = []
    return _by_keys(calls)


def _mistral(text: str, language: str) -> Any:
    return _by_keys(json.loads(text.replace("[TOOL_CALLS]", "")))


def _llama(text: str, language: str) -> Any:
    text = text.replace("<|python_tag|>", "")
    if ";" in text:
        calls = [json.loads(part) for part in text.split(";")]
    else:
        calls = _worked_out(text)
        calls = [calls] if isinstance(calls, dict) else calls
    return _by_keys(calls, "parameters")


def _glm(text: str, language: str) -> Any:
    name, *rest = text.split("\n")
    return [{name: json.loads(rest[0])}] if rest else [name]


def _xlam(text: str, language: str) -> Any:
    calls = json.loads(text)
    return _by_keys(calls["tool_calls"] if isinstance(calls, dict) else calls)


def _think_agent(text: str, language: str) -> Any:
    text = text.strip().replace("'", '"')
    return _by_keys(json.loads(text.split("</think>", 1)[-1].strip()))


def _function_gemma(text: str, language: str) -> Any:
    decoded = []
    for block in re.findall("<start_function_call>(.*?)<end_function_call>", text, re.DOTALL):
        block = block.strip()
        if block.startswith("call:"):
            name, brace, arguments = block.removeprefix("call:").partition("{")
            decoded.append({name.strip(): escaped_arguments(brace + arguments) if brace else {}})
    return decoded


def _minicpm(text: str, language: str) -> Any:
    if "<|thought_start|>" in text and "<|thought_end|>" in text:
        text = text.rsplit("<|thought_end|>", 1)[1]
    if "<|tool_call_start|>" not in text or "<|tool_call_end|>" not in text:
        return text.strip()
    code = text.rsplit("<|tool_call_end|>", 1)[0].split("<|tool_call_start|>", 1)[1].strip()
    code = code.lstrip("`").strip().removeprefix("python").rstrip("`").strip()
    return [_call(statement.value) for statement in ast.parse(code).body]  # type: ignore[attr-defined]


# -- prompted models with a habit of their own ------------------------------------------------------------------------


def _phi_prompted(text: str, language: str) -> Any:
    return _prompted(text.strip().removeprefix("```json").removeprefix("```python"), language)


def _gemini(text: str, language: str) -> Any:
    return _prompted(text.replace("```tool_code\n", "").replace("\n```", ""), language)


def _gorilla(text: str, language: str) -> Any:
    return _listed(f"[{text}]", language)


def _nexus(text: str, language: str) -> Any:
    text = text.removesuffix(";").replace(";", ",")
    decoded = _listed(f"[{text}]", language)
    return "irrelevant" if "out_of_domain" in text else decoded


def _nemotron(text: str, language: str) -> Any:
    inside = re.search(r"<TOOLCALL>(.*?)</TOOLCALL>", text, re.DOTALL)
    return _prompted(inside[1], language) if inside else []


def _served(text: str, language: str) -> Any:
    """The leaderboard asks a server for calls, which reads the model's own format: here `read_calls` is it."""
    calls = read_calls(text)
    if broken := [call for call in calls if call.error is not None]:
        raise ValueError(broken[0].message)
    return [{call.name: call.arguments or {}} for call in calls]


RULES: dict[str, Callable[[str, str], Any]] = {
    PROMPTED: _prompted,
    "OpenAICompletionsHandler": _served,
    "QwenHandler": _thinking,
    "DeepseekReasoningHandler": _thinking,
    "QwenFCHandler": lambda text, language: _hermes(_behind_thought(text), language),
    "NanbeigeFCHandler": lambda text, language: _hermes(_behind_thought(text), language),
    "PelicanVLFCHandler": lambda text, language: _hermes(_behind_thought(text), language),
    "Granite4FCHandler": _hermes,
    "Granite3FCHandler": _granite_3,
    "GraniteFunctionCallingHandler": _granite_20b,
    "ArchHandler": _arch,
    "PhiFCHandler": _phi,
    "PhiHandler": _phi_prompted,
    "Falcon3FCHandler": _falcon,
    "SalesforceLlamaHandler": _salesforce,
    "SalesforceQwenHandler": _salesforce,
    "SalesforceHandler": _xlam,
    "BitAgentHandler": _json_alone,
    "HammerHandler": _hammer,
    "MistralFCHandler": _mistral,
    "LlamaHandler_3_1": _llama,
    "GLMHandler": _glm,
    "ThinkAgentHandler": _think_agent,
    "FunctionGemmaHandler": _function_gemma,
    "MiniCPMFCHandler": _minicpm,
    "GeminiHandler": _gemini,
    "GorillaHandler": _gorilla,
    "NexusHandler": _nexus,
    "NemotronHandler": _nemotron,
}
"""Rule of each handler: (text, language) → what it decodes. `SalesforceHandler` is that of xLAM 1, which left the
package in 2025."""

# Models by the beginning of their names: (pattern, handler with the template's own tools, handler when prompted).
_MODELS: tuple[tuple[str, str | None, str | None], ...] = (
    (r"qwen/qwen3-", "QwenFCHandler", "QwenHandler"),
    (r"(?:zjared/haha|novasky-ai/sky-t1|phronetic-ai/rzn)", None, "QwenHandler"),
    (r"deepseek-ai/deepseek-r1", None, "DeepseekReasoningHandler"),
    (r"google/functiongemma", "FunctionGemmaHandler", None),
    (r"google/gemma-3-", None, PROMPTED),
    (r"meta-llama/llama-3\.1-", "LlamaHandler_3_1", PROMPTED),
    (r"meta-llama/llama-(?:3\.[23]|4)-", PROMPTED, PROMPTED),
    (r"salesforce/llama-xlam-2", "SalesforceLlamaHandler", None),
    (r"salesforce/xlam-2", "SalesforceQwenHandler", None),
    (r"salesforce/xlam-(?:1b|7b)", "SalesforceHandler", "SalesforceHandler"),
    (r"mistralai/ministral-8b", "MistralFCHandler", "MistralFCHandler"),
    (r"microsoft/phi-4-mini", "PhiFCHandler", "PhiHandler"),
    (r"microsoft/phi-4$", None, "PhiHandler"),
    (r"ibm-granite/granite-3\.[12]", "Granite3FCHandler", None),
    (r"ibm-granite/granite-4", "Granite4FCHandler", None),
    (r"ibm-granite/granite-20b-functioncalling", "GraniteFunctionCallingHandler", None),
    (r"madeagents/hammer", "HammerHandler", None),
    (r"(?:thudm|zai-org)/glm-4-9b", "GLMHandler", "GLMHandler"),
    (r"x-humanoid/pelican", "PelicanVLFCHandler", None),
    (r"(?:team-ace/toolace|watt-ai/watt-tool|uiuc-convai/coalm|speakleash/bielik)", None, PROMPTED),
    (r"openbmb/minicpm3", "MiniCPMFCHandler", PROMPTED),
    (r"tiiuae/falcon3", "Falcon3FCHandler", None),
    (r"katanemo/arch-agent", "ArchHandler", None),
    (r"bitagent/bitagent-bounty", "BitAgentHandler", None),
    (r"bitagent/bitagent-8b", None, PROMPTED),
    (r"thinkagents/thinkagent", "ThinkAgentHandler", None),
    (r"nanbeige/nanbeige4", "NanbeigeFCHandler", None),
    (r"gorilla-llm/gorilla-openfunctions", "GorillaHandler", "GorillaHandler"),
    (r"nexusflow/nexusraven", "NexusHandler", "NexusHandler"),
)


def handler_of(model: str, *, native: bool) -> str | None:
    """The leaderboard's handler for a model of its list; None where it has none.

    `native` says whether the model's own template shows the tools, which is the leaderboard's variant "FC".
    """
    # Also the name of a folder, and that of a model in the hub's cache.
    name = model.lower().replace("models--", "/").replace("--", "/")
    for pattern, calling, prompted in _MODELS:
        if re.search(rf"(?:^|/){pattern}", name):
            return calling if native else prompted
    return None


# Which rule a text is in, by its own marks, where nothing says whose it is: the first that matches. The last is
# for marks of models that the leaderboard asks through a server.
_MARKS: tuple[tuple[str, str], ...] = (
    (r"<tool_call>\n", "QwenFCHandler"),
    (r"<tool_call>", "Falcon3FCHandler"),
    (r"<\|tool_call\|>", "PhiFCHandler"),
    (r"<start_function_call>", "FunctionGemmaHandler"),
    (r"<function_call>\s*\{", "GraniteFunctionCallingHandler"),
    (r"<\|tool_call_start\|>\s*```", "MiniCPMFCHandler"),
    (r"<TOOLCALL>", "NemotronHandler"),
    (r"\[TOOL_CALLS\]\s*\[", "MistralFCHandler"),
    (r"<\|python_tag\|>\s*\{", "LlamaHandler_3_1"),
    (r"\A\s*\{\s*\"tool_calls\"", "SalesforceHandler"),
    (r"\A\s*\[?\s*\{\s*\"name\"\s*:\s*\"[^\"\n]*\"\s*,\s*\"parameters\"", "LlamaHandler_3_1"),
    (r"\A\s*\[?\s*\{\s*\"name\"\s*:", "SalesforceQwenHandler"),
    (r"\A[\w.-]+\n\s*\{", "GLMHandler"),
    (r"\A\s*[\w.]+\(.*\);\s*\Z", "NexusHandler"),
    (r"```tool_code\n", "GeminiHandler"),
    (
        r"<[|\uff5c]|<(?:tool_calls?|function_calls|invoke|minimax:tool_call|function)\b|\[TOOL_CALLS\]|^Action:",
        "OpenAICompletionsHandler",
    ),
)


def handler_by_marks(text: str) -> str:
    """The handler whose format a text is in; the prompted one's for a text without a mark."""
    text = text.rpartition("</think>")[2]
    for pattern, handler in _MARKS:
        if re.search(pattern, text, re.DOTALL | re.MULTILINE):
            return handler
    return "QwenHandler"
