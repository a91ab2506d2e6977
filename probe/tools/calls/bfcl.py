"""Whether a call is right as the Berkeley Function Calling Leaderboard says: name, arguments and their values.

The verdicts are those of the AST checker of bfcl-eval 2026.3.23, its oddities included (3 passes for 3.0, and [3]
does not for [3.0]), because numbers that are compared with the leaderboard's have to be made in the same way. Java and JavaScript
arguments are strings of source text there; they are read as there.
Names are compared as they are shown: nothing here turns dots into underscores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probe.jsontext import printable
from probe.tools.calls.leaderboard import DecodedCall, Decoding, decode, handler_by_marks

KINDS = {
    "decoder_failed": "the text cannot be decoded where a call is asked for",
    "decoder_wrong_output_format": "what is decoded is no list of calls",
    "decoder_success": "a call where none of the functions fits",
    "wrong_count": "no call, or more than one",
    "wrong_func_name": "another function than the answer's",
    "missing_required": "a required argument is not there",
    "unexpected_param": "an argument that the function or the answer does not have",
    "type_error": "an argument of another type",
    "value_error": "an argument with none of the accepted values",
    "missing_optional": "an argument that the answer does not let be left out",
}
"""Every way of being wrong, in the leaderboard's words."""

_PYTHON = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
}
_JAVA = {
    **dict.fromkeys(("byte", "short", "integer", "long"), int),
    **dict.fromkeys(("float", "double"), float),
    **dict.fromkeys(("Array", "ArrayList", "Queue", "Stack"), list),
    **{"boolean": bool, "Set": set, "HashMap": dict, "Hashtable": dict},
}
_JAVASCRIPT = {"integer": int, "float": float, "Bigint": int, "Boolean": bool, "dict": dict, "array": list}
_LISTS = {"python": ("array", "tuple"), "java": ("Array", "ArrayList"), "javascript": ("array",)}
_MAX_SOURCE = 4096
"""Characters of a Java or JavaScript value that are read: what is longer stays text. The longest answer has 200."""


@dataclass(frozen=True)
class BfclVerdict:
    valid: bool
    error: str | None
    """One of `KINDS`; None where the call is right."""
    message: str | None
    handler: str | None = None
    """The leaderboard's handler by whose rule the text was decoded; None where nothing was written."""


class _Wrong(Exception):
    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def bfcl_verdict(
    decoding: Decoding, facts: Any, required: Sequence[str], handler: str | None = None
) -> BfclVerdict | None:
    """Whether what is decoded from a completion is right for a task of `probe tasks import bfcl`.

    `facts` is the task's `metadata.bfcl`, `required` the arguments that the answer's function requires. None for
    facts of another shape, those without `types` included, which earlier imports left out.
    """
    if not _imported(facts):
        return None
    calls = decoding.calls
    try:
        if "irrelevance" in facts["category"]:
            if calls:
                raise _Wrong("decoder_success", f"{calls[0].name} is called, and no function fits")
        elif "answer" not in facts:
            if not calls:
                raise _Wrong("decoder_failed", decoding.message or "there is no call in the text")
        elif decoding.error is not None:
            raise _Wrong(decoding.error, decoding.message or "there is no call in the text")
        elif len(calls) != 1:
            raise _Wrong("wrong_count", f"{len(calls) or 'no'} calls, where one is right")
        else:
            _check_call(calls[0], facts, required)
    except _Wrong as wrong:
        return BfclVerdict(False, wrong.kind, printable(str(wrong), 400), handler)
    return BfclVerdict(True, None, None, handler)


def verdict_on(
    text: str, facts: Any, required: Sequence[str], *, handler: str | None = None
) -> BfclVerdict | None:
    """The leaderboard's verdict on what a model wrote, by the rule of a handler of it.

    Without one, the text's own marks say which rule it is: see `probe.tools.calls.leaderboard`.
    """
    if not _imported(facts):
        return None
    handler = handler or handler_by_marks(text)
    return bfcl_verdict(decode(text, handler, _language(facts)), facts, required, handler)


def _language(facts: Mapping[str, Any]) -> str:
    return {"simple_java": "java", "simple_javascript": "javascript"}.get(facts["category"], "python")


def _imported(facts: Any) -> bool:
    """Whether metadata is of the import: a task file may say anything under that name."""
    if not isinstance(facts, dict) or not isinstance(facts.get("category"), str):
        return False
    answer = facts.get("answer", {"": {}})
    return (
        isinstance(answer, dict)
        and [type(accepted) for accepted in answer.values()] == [dict]
        and all(isinstance(options, list) for accepted in answer.values() for options in accepted.values())
        and isinstance(facts.get("types", None if "answer" in facts else {}), dict)
        and isinstance(facts.get("names", {}), dict)
    )


def _check_call(call: DecodedCall, facts: Mapping[str, Any], required: Sequence[str]) -> None:
    ((function, accepted),) = facts["answer"].items()
    types, arguments, language = facts["types"], call.arguments, _language(facts)
    if facts.get("names", {}).get(call.name, call.name) != function:
        raise _Wrong("wrong_func_name", f"{call.name} is called, and {function} is right")
    for name in required:
        if name not in arguments:
            raise _Wrong("missing_required", f"{name} is required")
    for name, value in arguments.items():
        if name not in types or name not in accepted:
            raise _Wrong("unexpected_param", f"{name} is no argument of the answer")
        word, inner = types[name] if isinstance(types[name], list) else (types[name], None)
        try:
            _check_value(name, value, accepted[name], word, inner, language)
        except (TypeError, AttributeError, KeyError):  # an answer of another shape than its type says
            raise _Wrong(
                "value_error", f"{name}: {value!r} cannot be compared with {accepted[name]!r}"
            ) from None
    for name, values in accepted.items():
        if name not in arguments and "" not in values:
            raise _Wrong("missing_optional", f"{name} may not be left out")


def _check_value(name: str, value: Any, accepted: list, word: str, inner: str | None, language: str) -> None:
    kinds = {"python": _PYTHON, "java": _JAVA, "javascript": _JAVASCRIPT}[language]
    kind = kinds.get(word, str)
    inner_kind = kinds.get(inner, str) if inner is not None and word in _LISTS[language] else None
    if language == "python":
        if word == "tuple" and type(value) is tuple:
            value = list(value)
        if word == "float" and type(value) is int:
            value = float(value)
    elif type(value) is not str:
        raise _Wrong("type_error", f"{name}: {value!r} is no text, as a value of {language} has to be")
    elif len(value) <= _MAX_SOURCE:
        value = (_java if language == "java" else _javascript)(value, word, inner)
    is_variable = _check_type(name, value, accepted, kind, inner_kind)
    check = (
        None if is_variable else _CHECKS.get((kind, inner_kind is dict) if kind is list else (kind, False))
    )
    right = check(value, accepted) if check else value in accepted
    if not right:
        raise _Wrong("value_error", f"{name}: {value!r} is none of {accepted!r}")


def _check_type(name: str, value: Any, accepted: list, kind: type, inner: type | None) -> bool:
    """Whether the value stands for a variable: the answer is of another type than the function's definition.

    Raises _Wrong for a value of neither type.
    """
    answered = _answered(accepted)
    if type(value) is kind:
        fits = inner is None or any(
            not isinstance(option, list) or all(type(item) in (inner, _answered(option)) for item in value)
            for option in accepted
        )
        if fits:
            return answered is not None and answered is not kind
    elif answered is not None and type(value) is answered:
        return True
    raise _Wrong("type_error", f"{name}: {value!r} is not of type {kind.__name__}")


def _answered(accepted: Sequence[Any]) -> type | None:
    """Type of the first accepted value; the empty string says that the argument may be left out."""
    return next((type(value) for value in accepted if value != ""), None)


# -- values --------------------------------------------------------------------------------------------------------

_IGNORED = re.compile(r"[ ,./\-_*^]")


def _plain(value: Any) -> Any:
    """Text without what may be written in several ways; anything else as it is."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if type(value) is str else value


def _right_text(value: str, accepted: list) -> bool:
    return _plain(value) in [_plain(option) for option in accepted if type(option) is str]


def _right_list(value: list, accepted: list) -> bool:
    return [_plain(item) for item in value] in [[_plain(item) for item in option] for option in accepted]


def _right_dict(value: dict, accepted: list) -> bool:
    return any(
        all(
            key in option and _plain(item) in [_plain(part) for part in option[key]]
            for key, item in value.items()
        )
        and all(key in value or "" in parts for key, parts in option.items())
        for option in accepted
        if option != ""
    )


def _right_dicts(value: list, accepted: list) -> bool:
    """Dicts in the order of the answer; the answer "" is a list of none."""
    return any(
        len(value) == len(option)
        and all(_right_dict(item, [part]) for item, part in zip(value, option, strict=True))
        for option in accepted
    )


_CHECKS: dict[tuple[type, bool], Callable[[Any, list], bool]] = {
    (str, False): _right_text,
    (dict, False): _right_dict,
    (list, False): _right_list,
    (list, True): _right_dicts,
}


# -- Java ----------------------------------------------------------------------------------------------------------

_NUMBER = r"-?\d+(\.\d+)?([eE][+-]?\d+)?"
_JAVA_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    **dict.fromkeys(("byte", "short", "integer"), (r"-?\d+$", int)),
    "long": (r"-?\d+[lL]$", lambda text: int(re.sub("[lL]$", "", text))),
    "float": (_NUMBER + "[fF]$", lambda text: float(re.sub("[fF]$", "", text))),
    "double": (_NUMBER + "$", float),
}


def _java(text: str, word: str, inner: str | None = None) -> Any:
    """The value that Java source of a type stands for; the text itself where it is none."""
    if word in _JAVA_SCALARS:
        pattern, convert = _JAVA_SCALARS[word]
        return convert(text) if re.match(pattern, text) else text
    if word == "boolean":
        return {"true": True, "false": False}.get(text, text)
    reader = {"Array": _java_array, "ArrayList": _java_list}.get(word)
    if reader is not None:
        return reader(text, inner)
    return _java_map(text) if word == "HashMap" else text


def _java_array(text: str, inner: str | None) -> Any:
    match = re.search(r"new\s+\w+\[\]\s*\{(.*?)\}", text)
    if match is None:
        return text
    parts = [part.strip() for part in match[1].split(",") if part.strip()]
    return [_java(part, inner) if inner else _java_bare(part) for part in parts]


def _java_list(text: str, inner: str | None) -> Any:
    if match := re.search(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)", text):
        parts = match[1].split(",")
    elif (opened := re.search(r"new\s+ArrayList<\w*>\(\)\s*\{\{\s*", text)) and "}}" in text[
        opened.end() + 1 :
    ]:
        # Found by hand: a pattern of white space around anything takes cubic time on white space alone.
        parts = re.findall(r"add\((.+?)\)", text[opened.end() : text.index("}}", opened.end() + 1)])
    else:
        return [] if re.search(r"new\s+ArrayList<\w*>\(\)", text) else text
    parts = [part.strip() for part in parts]
    if inner in ("char", "String"):
        return [part[1:-1] for part in parts]
    return [_java(part, inner) if inner else _java_bare(part) for part in parts]


def _java_map(text: str) -> Any:
    opened = re.search(r"new\s+HashMap<.*?>\s*\(\)\s*\{\s*\{?", text, re.DOTALL)
    if opened and "}" in text[opened.end() :]:
        body = text[opened.end() : text.index("}", opened.end())]
        return {key: _java_bare(value.strip()) for key, value in re.findall(r'put\("(.*?)",\s*(.*?)\)', body)}
    return {} if re.search(r"new\s+HashMap<.*?>\s*\(\)", text) else text


def _java_bare(text: str) -> Any:
    """A Java value whose type nothing says."""
    for word in ("boolean", "long", "float"):
        if (value := _java(text, word)) is not text:
            return value
    return text[1:-1] if text.startswith('"') and text.endswith('"') else _number(text)


def _number(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    return text


# -- JavaScript ----------------------------------------------------------------------------------------------------

_JAVASCRIPT_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "integer": (r"-?\d+$", int),
    "float": (r"-?\d+(\.\d+)?$", float),
    "Bigint": (r"-?\d+n$", lambda text: int(text[:-1])),
}


def _javascript(text: str, word: str, inner: str | None = None) -> Any:
    """The value that JavaScript source of a type stands for; the text itself where it is none."""
    if word in _JAVASCRIPT_SCALARS:
        pattern, convert = _JAVASCRIPT_SCALARS[word]
        return convert(text) if re.match(pattern, text) else text
    if word == "String":
        return _unquoted(text)
    if word == "Boolean":
        return {"true": True, "false": False}.get(text, text)
    return {"array": _javascript_array, "dict": _javascript_dict}.get(word, lambda text, _: text)(text, inner)


def _unquoted(text: str) -> str:
    quoted = any(text.startswith(mark) and text.endswith(mark) for mark in "\"'")
    return text[1:-1] if quoted else text


def _javascript_array(text: str, inner: str | None) -> Any:
    text = text.strip()
    if (rows := _rows(text)) is not None:
        parts = [row.strip() for row in re.findall(r"\[(.*?)\]", rows)]
        parts = [part.removeprefix("[") if index == 0 else part for index, part in enumerate(parts)]
        return [[_javascript_bare(item) for item in part.split(",")] for part in parts]
    match = re.match(r"\[(.*?)\]|new\s+Array\((.*?)\)", text)
    if match is None:
        return text
    body = (match[1] if match[1] is not None else match[2]).strip()
    items = [item.strip() for item in body.split(",")] if body else []
    if inner is None:
        return [_javascript_bare(item) for item in items]
    if inner not in (*_JAVASCRIPT, "String", "any"):
        return text if items else []
    return [_javascript(item, inner, "String" if item.startswith(("'", '"')) else None) for item in items]


def _rows(text: str) -> str | None:
    """The list of lists that a text begins with. One walk: as one pattern it can take exponential time."""
    opened = re.match(r"\[\s*\[|new\s+Array\(\s*\[", text)
    if opened is None:
        return None
    end, closer = opened.end(), re.compile(r"\s*\]" if opened[0].startswith("[") else r"\s*\)")
    while closed := re.compile(r"[^\]\n]*\]").match(text, end):
        end = closed.end()
        if after := re.compile(r"\s*,\s*\[").match(text, end):
            end = after.end()
        elif last := closer.match(text, end):
            return text[: last.end()]
    return None


def _javascript_dict(text: str, inner: str | None) -> Any:
    text = text.strip()
    match = re.match(r"\{(.*?)\}", text)
    if text == "{}" or match is None:
        return {} if text == "{}" else text
    pairs = re.findall(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)", match[1])
    values: dict[str, Any] = {}
    for key, value in pairs:
        listed = value.strip().startswith("[") and value.strip().endswith("]")
        values[key.strip().strip("'\"")] = (
            _javascript_array(value, None) if listed else _javascript_bare(value.strip().strip("'\""))
        )
    return values


def _javascript_bare(text: str) -> Any:
    """A JavaScript value whose type nothing says."""
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    return bare if (bare := _unquoted(text)) != text else _number(text)
