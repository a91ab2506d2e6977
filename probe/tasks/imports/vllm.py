"""Outputs of vLLM with their token ids: `RequestOutput`s as JSON, and answers of its server with `return_token_ids`.

An output is `{request_id, prompt, prompt_token_ids, outputs: [{text, token_ids, logprobs, finish_reason}]}`, in which
`logprobs` has an object for each token, by id `{logprob, rank, decoded_token}`; an answer of the server is one of OpenAI's
interfaces with `prompt_token_ids` and, in each choice, `token_ids`. `messages` and `tools` are taken where they stand beside
it. The ids of a replay are those of the prompt and of the output; log-probabilities are of the output's, in nats.
Source: vllm/outputs.py, vllm/logprobs.py, vllm/entrypoints/openai.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from probe.jsontext import kind_of
from probe.tasks.imports.chat import chat, chats, numbered
from probe.tasks.imports.files import Entry, items, members, parsed, values
from probe.tasks.imports.openai import exchange
from probe.tasks.imports.record import Chat, Format, Item, LoggedTurn, Record


def read(paths: Sequence[Path], _category: str | None) -> Iterator[Item]:
    """Records of files in order, one an output."""
    return items((entry for path in paths for entry in values(path)), _records)


def _records(entry: Entry) -> Iterator[Record]:
    value = entry.value
    if not isinstance(value, dict):
        raise ValueError(f"is {kind_of(value)}, not an object")
    request, response = exchange(value)
    outputs = (
        value.get("outputs") if isinstance(value.get("outputs"), list) else (response or {}).get("choices")
    )
    if not isinstance(outputs, list) or not outputs:
        raise ValueError("has no outputs")
    holder = value if isinstance(value.get("outputs"), list) else response or {}
    name = holder.get("request_id") or holder.get("id") or value.get("id")
    tools = parsed(request.get("tools"))
    asked = _asked(request, value)
    for index, output in enumerate(outputs):
        if not isinstance(output, dict):
            raise ValueError(f"has {kind_of(output)} among its outputs")
        spoken = members(output.get("message")) or {"content": output.get("text")}
        messages = numbered([*asked, chat({**spoken, "role": "assistant"})])
        several = len(outputs) > 1
        identity = None if name is None else f"{name}.{index + 1}" if several else str(name)
        end = output.get("finish_reason")
        yield Record(
            f"{entry.place} output {index + 1}" if several else entry.place,
            identity,
            [
                LoggedTurn(
                    messages[:-1],
                    messages[-1],
                    tools,
                    request.get("tool_choice"),
                    end if isinstance(end, str) else None,
                )
            ],
            messages,
            tools,
            next((part["model"] for part in (holder, request) if isinstance(part.get("model"), str)), None),
            tokens=_tokens(holder, output),
        )


def _asked(request: Mapping[str, Any], value: Mapping[str, Any]) -> list[Chat]:
    """The messages of the request, or its text as the user's."""
    if isinstance(parsed(request.get("messages")), list):
        return chats(request["messages"])
    prompt = next((part["prompt"] for part in (value, request) if isinstance(part.get("prompt"), str)), None)
    if prompt is None:
        raise ValueError("has neither messages nor the text of its prompt")
    return [{"role": "user", "content": prompt}]


def _tokens(holder: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, Any]:
    """`token_ids` of prompt and output, `emitted` and `logprobs` of the output. Raises ValueError where they do not fit."""
    before = holder.get("prompt_token_ids")
    before = before if before is not None else output.get("prompt_token_ids")
    emitted = output.get("token_ids")
    if before is None or emitted is None:
        raise ValueError(
            "has no token ids: ask the server for them (return_token_ids), or import it as openai"
        )
    for ids in (before, emitted):
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError("has token ids that are no list of whole numbers")
    if not emitted:
        raise ValueError("has an output without a token")
    tokens: dict[str, Any] = {
        "token_ids": [*before, *emitted],
        "emitted": [[len(before), len(before) + len(emitted)]],
    }
    given = output.get("logprobs")
    if given is not None:
        tokens["logprobs"] = _logprobs(given, emitted)
    return tokens


def _logprobs(given: Any, emitted: Sequence[int]) -> list[float]:
    """Log-probability of each emitted token, nats, in any of the spellings of vLLM and OpenAI."""
    if isinstance(given, dict):
        given = given.get("content") or given.get("token_logprobs")
    if not isinstance(given, list) or len(given) != len(emitted):
        raise ValueError("has log-probabilities that are not one for each token of its output")
    out: list[float] = []
    for token, entry in zip(emitted, given, strict=True):
        if isinstance(entry, dict) and "logprob" not in entry:
            entry = entry.get(str(token))
        number = entry.get("logprob") if isinstance(entry, dict) else entry
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError("has no log-probability for a token of its output")
        out.append(float(number))
    return out


VLLM = Format(
    name="vllm",
    about="outputs of vLLM with token ids and log-probabilities, of its engine and of its server",
    read=read,
    suffixes=(".jsonl", ".json"),
    replay=True,
)
