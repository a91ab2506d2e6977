"""Logs of other programs become tasks: each format as its program writes it, in files of these tests' own making."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner

import probe
from probe.cli import main
from probe.errors import BadInput, UsageError
from probe.tasks import read_tasks
from probe.tasks.imports import files
from probe.tasks.imports.definitions import parameters, typed
from probe.tasks.imports.registry import FORMATS
from probe.tools.definitions import read_catalogue

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Weather of a city.", "parameters": CITY}
HOTEL = {"name": "find_hotel", "description": "Hotels of a city.", "parameters": CITY}
TOOLS = [{"type": "function", "function": tool} for tool in (WEATHER, HOTEL)]
ASK = {"role": "user", "content": "How warm is it in Oslo?"}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"temp": 3}'}


def called(name="get_weather", call_id="c1", arguments: Any = '{"city": "Oslo"}') -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CALL = {"role": "assistant", "content": None, "tool_calls": [called()]}
SAY = {"role": "assistant", "content": "It is 3 degrees."}
TALK = [ASK, CALL, RESULT, SAY]


def jsonl(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def taken(format: str, path: Path | list[Path], **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """(tasks, reasons of what is left out) of a log, once the counts add up and the tasks read as a task file."""
    imported = probe.import_tasks(format, path, **options)
    account, tasks = imported.account, imported.tasks
    assert account.tasks == len(tasks)
    assert account.decisions == account.tasks + account.decisions_skipped
    assert account.records >= account.records_skipped
    if not FORMATS[format].catalogue:
        first = path[0] if isinstance(path, list) else path
        file = jsonl((first if first.is_dir() else first.parent) / "tasks.out", *tasks)
        assert [task.id for task in read_tasks(file, None).tasks] == [task["id"] for task in tasks]
        file.unlink()
    return tasks, [item.reason for item in account.skipped]


def targets(tasks: list[dict[str, Any]]) -> list[Any]:
    return [task["target"] for task in tasks]


# --- OpenAI ---


def completion(message: dict[str, Any], **more: Any) -> dict[str, Any]:
    end = "tool_calls" if message.get("tool_calls") else "stop"
    choice = {"index": 0, "message": message, "finish_reason": end}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": "m-1", "choices": [choice]} | more


def exchange(messages: list[Any], message: dict[str, Any], **request: Any) -> dict[str, Any]:
    return {
        "request": {"model": "m", "messages": messages, "tools": TOOLS} | request,
        "response": completion(message),
    }


def test_a_request_with_its_response_is_one_decision(tmp_path):
    path = jsonl(tmp_path / "log.jsonl", exchange([ASK], CALL, tool_choice="auto", temperature=0.2))
    (task,), left = taken("openai", path)
    assert left == []
    assert task["id"] == "chatcmpl-1"
    assert (task["kind"], task["target"]) == ("tool_selection", "get_weather")
    assert task["messages"] == [ASK]
    assert task["tools"] == [WEATHER, HOTEL]
    assert "parallel_calls" not in task
    assert task["metadata"]["model"] == "m-1"
    log = task["metadata"]["log"]
    assert log["place"] == f"{path}:1"
    assert log["said"] == CALL  # with the arguments, which the task has no field for
    assert log["tool_choice"] == "auto"


def test_the_history_of_a_request_keeps_calls_results_and_reasoning(tmp_path):
    history = [
        {"role": "developer", "content": "Be brief."},
        ASK,
        CALL | {"reasoning_content": "Look."},
        RESULT,
    ]
    (task,), _ = taken("openai", jsonl(tmp_path / "log.jsonl", exchange(history, SAY)))
    assert task["target"] is None
    assert task["messages"] == history


def test_every_turn_of_a_chat_without_a_response_is_a_decision(tmp_path):
    tasks, left = taken(
        "openai", jsonl(tmp_path / "log.jsonl", {"messages": TALK, "tools": TOOLS, "id": "x"})
    )
    assert [(task["id"], task["target"], len(task["messages"])) for task in tasks] == [
        ("x.1", "get_weather", 1),
        ("x.2", None, 3),
    ]
    assert left == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (exchange([ASK], CALL, tool_choice="none"), "could call no tool: tool_choice is none"),
        (exchange([ASK], CALL, tool_choice={"type": "function", "function": {"name": "get_weather"}}), "names the tool"),
        (exchange([ASK], CALL, tools=[]), "shows no tools"),
        (exchange([ASK], CALL, tools=TOOLS[1:]), 'calls "get_weather", which is not shown'),
        (exchange([ASK], {"role": "assistant", "content": ""}), "says nothing and calls nothing"),
        (
            {"request": {"messages": [ASK], "tools": TOOLS}, "response": completion(SAY) | {
                "choices": [{"message": SAY, "finish_reason": "length"}]}},
            "calls nothing and was cut (length)",
        ),
        (
            exchange([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], CALL),
            'message 1 (user) has a part of the type "image_url"',
        ),
        ({"request": {"messages": [ASK]}, "response": {"error": {"message": "overloaded"}}}, "error: overloaded"),
        ({"messages": [ASK], "tools": TOOLS}, "has no turn of the assistant"),
        ({"object": "chat.completion.chunk", "choices": []}, "piece of a streamed answer"),
        ({"prompt": "x", "choices": [{"text": "y"}]}, "completion of a text"),
        ([1], "is a list, not an object"),
    ],
)  # fmt: skip
def test_what_is_no_decision_is_left_out_with_its_reason(tmp_path, line, reason):
    tasks, left = taken("openai", jsonl(tmp_path / "log.jsonl", line, exchange([ASK], CALL)))
    assert len(tasks) == 1
    assert len(left) == 1
    assert reason in left[0]


def test_a_response_may_be_its_message_alone(tmp_path):
    lines = [
        {"messages": [ASK], "tools": TOOLS, "response": CALL},
        {"input": [ASK], "tools": TOOLS, "output": SAY},
    ]
    assert targets(taken("openai", jsonl(tmp_path / "log.jsonl", *lines))[0]) == ["get_weather", None]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"temp": 3}, {"temp": 4}], '[{"temp": 3}, {"temp": 4}]'),
        ([[1, 2], None], "[[1, 2], null]"),
        ({"temp": 3}, '{"temp": 3}'),
        (3.5, "3.5"),
        (False, "false"),
        (None, ""),
        ({"type": "text", "text": "cold"}, "cold"),
        ([{"type": "text", "text": "[3]"}], "[3]"),
        (["cold"], "cold"),
    ],
)
def test_a_result_that_a_log_has_as_it_came_is_its_json(tmp_path, content, told):
    history = [ASK, CALL, RESULT | {"content": content}]
    (task,), left = taken("openai", jsonl(tmp_path / "log.jsonl", exchange(history, SAY)))
    assert (task["messages"][2]["content"], left) == (told, [])


def piece(index: int = 0, end: str | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "finish_reason": end}
    return {"id": "s1", "object": "chat.completion.chunk", "model": "m-1", "choices": [choice]}


def test_a_streamed_answer_is_put_together(tmp_path):
    def part(number: int, arguments: str, **more: Any) -> dict[str, Any]:
        return {"index": number, "function": {"arguments": arguments, **more}}

    pieces = [
        piece(role="assistant", content=None, reasoning_content="Lo"),
        piece(reasoning_content="ok."),
        piece(tool_calls=[part(0, "", name="get_weather") | {"id": "c1", "type": "function"}]),
        piece(tool_calls=[part(0, '{"city": ')]),
        piece(tool_calls=[part(0, '"Oslo"}'), part(1, "{}", name="find_hotel") | {"id": "c2"}]),
        piece(end="tool_calls"),
        {"id": "s1", "object": "chat.completion.chunk", "choices": [], "usage": {}},
    ]
    sent = "".join(f"data: {json.dumps(each)}\n\n" for each in pieces) + "data: [DONE]\n"
    asked = {"messages": [ASK], "tools": TOOLS, "stream": True}
    lines = [{"request": asked, "response": given} for given in (pieces, sent, pieces[:-2])]
    (first, second), (reason,) = taken("openai", jsonl(tmp_path / "log.jsonl", *lines))
    turn = {"role": "assistant", "content": None, "reasoning_content": "Look."}
    turn["tool_calls"] = [called(), called("find_hotel", "c2", "{}")]
    for task in (first, second):
        assert task["target"] == ["get_weather", "find_hotel"] and task["metadata"]["log"]["said"] == turn
    assert "stream that has no end" in reason
    item = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"}
    events = [
        {"type": "response.created", "response": {"id": "r1"}},
        {"type": "response.completed", "response": {"id": "r1", "object": "response", "output": [item]}},
    ]
    line = {"request": {"input": "Warm?", "tools": [{"type": "function", **WEATHER}]}, "response": events}
    assert targets(taken("openai", jsonl(tmp_path / "log.jsonl", line))[0]) == ["get_weather"]
    events = [
        {"type": "message_start", "message": {"id": "m1", "type": "message", "role": "assistant", "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "So: "}},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "c1", "name": "get_weather"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"city":'}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '"Oslo"}'}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}},
        {"type": "message_stop"},
    ]  # fmt: skip
    tools = [{"name": "get_weather", "description": "", "input_schema": CITY}]
    line = {"request": {"messages": [ASK], "tools": tools}, "response": events}
    (task,), _ = taken("anthropic", jsonl(tmp_path / "log.jsonl", line))
    turn = task["metadata"]["log"]["said"]
    assert turn["content"] == "So: " and turn["tool_calls"] == [called(arguments={"city": "Oslo"})]


def test_a_conversation_with_a_turn_that_says_nothing_is_no_replay(tmp_path):
    lines = [exchange([ASK], {"role": "assistant", "content": None}), exchange([ASK], CALL)]
    tasks, (reason,) = taken("openai", jsonl(tmp_path / "log.jsonl", *lines), kind="replay")
    assert len(tasks) == 1 and reason == "message 2 (assistant) says nothing and calls nothing"


def test_several_calls_of_a_turn_are_several_targets(tmp_path):
    both = CALL | {"tool_calls": [called(), called("find_hotel", "c2"), called("get_weather", "c3")]}
    (task,), _ = taken("openai", jsonl(tmp_path / "log.jsonl", exchange([ASK], both)))
    assert (task["target"], task["parallel_calls"]) == (["get_weather", "find_hotel"], True)


def test_the_earlier_function_call_and_its_results_have_ids(tmp_path):
    earlier = {"role": "assistant", "content": None, "function_call": called()["function"]}
    talk = [ASK, earlier, {"role": "function", "name": "get_weather", "content": "3"}, SAY]
    tasks, _ = taken(
        "openai", jsonl(tmp_path / "log.jsonl", {"messages": talk, "functions": [WEATHER, HOTEL]})
    )
    assert targets(tasks) == ["get_weather", None]
    call, result = tasks[1]["messages"][1:]
    assert call["tool_calls"][0]["id"] == result["tool_call_id"] == "call00001"


def test_batch_files_are_put_together(tmp_path):
    body = {"model": "m", "messages": [ASK], "tools": TOOLS}
    asked = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body} for name in "abc"
    ]
    answered = [
        {"custom_id": "b", "response": {"status_code": 200, "body": completion(SAY)}, "error": None},
        {"custom_id": "a", "response": {"status_code": 200, "body": completion(CALL)}, "error": None},
        {"custom_id": "d", "response": {"status_code": 200, "body": completion(CALL)}, "error": None},
    ]
    paths = [jsonl(tmp_path / "in.jsonl", *asked), jsonl(tmp_path / "out.jsonl", *answered)]
    tasks, left = taken("openai", paths)
    assert [(task["id"], task["target"]) for task in tasks] == [("b", None), ("a", "get_weather")]
    assert [reason.split(":")[0] for reason in left] == ["has no response", "has no request"]


def responded(output: list[Any], **more: Any) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "status": "completed",
        "model": "m-1",
        "output": output,
    } | more


FLAT = [{"type": "function", "strict": True, **tool} for tool in (WEATHER, HOTEL)]
ITEM = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Oslo"}'}


def test_items_of_the_responses_interface_are_turns(tmp_path):
    request = {
        "model": "m",
        "instructions": "Be brief.",
        "input": [
            ASK,
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Look."}]},
            ITEM,
            {"type": "function_call_output", "call_id": "c1", "output": "3"},
        ],
        "tools": [*FLAT, {"type": "web_search"}],
    }
    answer = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "It is 3."}],
    }
    (task,), _ = taken(
        "openai", jsonl(tmp_path / "log.jsonl", {"request": request, "response": responded([answer])})
    )
    assert task["messages"] == [
        {"role": "system", "content": "Be brief."},
        ASK,
        {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [called()]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    assert task["target"] is None
    assert task["tools"] == [WEATHER, HOTEL]
    assert task["metadata"]["log"]["tools_without_definition"] == ["web_search"]


def test_a_response_goes_on_from_the_one_it_names(tmp_path):
    first = {"request": {"input": ASK["content"], "tools": FLAT}, "response": responded([ITEM])}
    output = [{"type": "function_call_output", "call_id": "c1", "output": "3"}]
    second = {"request": {"input": output, "tools": FLAT, "previous_response_id": "resp_1"},
              "response": responded([ITEM | {"name": "find_hotel"}], id="resp_2")}  # fmt: skip
    lost = {
        "request": {"input": "x", "previous_response_id": "resp_0"},
        "response": responded([ITEM], id="resp_3"),
    }
    tasks, left = taken("openai", jsonl(tmp_path / "log.jsonl", first, second, lost))
    assert targets(tasks) == ["get_weather", "find_hotel"]
    assert tasks[1]["messages"] == [ASK, CALL, {"role": "tool", "content": "3", "tool_call_id": "c1"}]
    assert left == ['goes on from the response "resp_0", which is not before it in the log']


def test_a_conversation_that_is_logged_with_every_request_is_replayed_once(tmp_path):
    path = jsonl(
        tmp_path / "log.jsonl",
        exchange([ASK], CALL | {"reasoning_content": "Thought that the next request no longer has."}),
        exchange([ASK, CALL, RESULT], SAY),
        exchange([ASK], CALL | {"tool_calls": [called("find_hotel")]}),
    )
    tasks, left = taken("openai", path, kind="replay")
    assert [len(task["messages"]) for task in tasks] == [4, 2]
    assert tasks[0]["messages"] == TALK
    assert tasks[0]["kind"] == "replay"
    assert left == ["goes on in a longer record, which has all of it"]


# --- Anthropic ---

USE = {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Oslo"}}


def test_blocks_of_anthropic_are_turns(tmp_path):
    tools = [
        {"name": t["name"], "description": t["description"], "input_schema": CITY} for t in (WEATHER, HOTEL)
    ]
    back = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "3"}]}
    request = {
        "model": "m",
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            ASK,
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "Look.", "signature": "x"}, USE],
            },
            {"role": "user", "content": [back, {"type": "text", "text": "And a hotel?"}]},
        ],
        "tools": tools,
        "tool_choice": {"type": "any"},
    }
    answer = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m-1", "stop_reason": "tool_use",
              "content": [{"type": "text", "text": "I look."}, USE | {"name": "find_hotel", "id": "c2"}]}  # fmt: skip
    forced = {
        "request": request | {"tool_choice": {"type": "tool", "name": "find_hotel"}},
        "response": answer,
    }
    path = jsonl(tmp_path / "log.jsonl", {"request": request, "response": answer}, forced)
    (task,), left = taken("anthropic", path)
    assert task["messages"] == [
        {"role": "system", "content": "Be brief."},
        ASK,
        {"role": "assistant", "content": None, "reasoning_content": "Look.",
         "tool_calls": [called(arguments={"city": "Oslo"})]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "user", "content": "And a hotel?"},
    ]  # fmt: skip
    assert (task["target"], task["tools"]) == ("find_hotel", [WEATHER, HOTEL])
    assert left == ["decides nothing: tool_choice names the tool"]


def test_a_message_batch_is_put_together(tmp_path):
    params = {"messages": [ASK], "tools": [WEATHER | {"input_schema": CITY}]}
    asked = tmp_path / "in.json"
    asked.write_text(json.dumps({"requests": [{"custom_id": name, "params": params} for name in "ab"]}))
    message = {"type": "message", "content": [USE], "stop_reason": "tool_use"}
    answered = jsonl(
        tmp_path / "out.jsonl",
        {"custom_id": "a", "result": {"type": "succeeded", "message": message}},
        {"custom_id": "b", "result": {"type": "expired"}},
    )
    tasks, left = taken("anthropic", [asked, answered])
    assert targets(tasks) == ["get_weather"]
    assert left == ["the request was expired"]


# --- Inspect, Scout ---

POOL = [{"role": "user", "content": "attachment://" + "a" * 32}, {"role": "user", "content": "And a hotel?"}]
ATTACHED = {"a" * 32: "How warm is it in Oslo?"}


def event(message: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "event": "model", "model": "m-1", "input": [], "tools": [WEATHER, HOTEL], "tool_choice": "auto",
        "output": {"choices": [{"message": message, "stop_reason": "stop"}]},
    } | more  # fmt: skip


INSPECT_CALL = {"role": "assistant", "content": [{"type": "reasoning", "reasoning": "Look."}],
                "tool_calls": [{"id": "c1", "function": "get_weather", "arguments": {"city": "Oslo"}}]}  # fmt: skip
FAILED = {"role": "tool", "tool_call_id": "c1", "function": "get_weather", "content": "",
          "error": {"type": "timeout", "message": "too slow"}}  # fmt: skip


def sample(**more: Any) -> dict[str, Any]:
    return {
        "id": "s1", "epoch": 1, "messages": [POOL[0], INSPECT_CALL, FAILED, SAY], "attachments": ATTACHED,
        "events_data": {"messages": [*POOL, INSPECT_CALL, FAILED], "calls": []},
        "scores": {"x": {"value": float("nan")}},
        "events": [
            event(INSPECT_CALL, input_refs=[[0, 1]]),
            {"event": "tool", "id": "c1"},
            event(SAY, input_refs=[[0, 1], [2, 4]]),
            event(SAY, input=[ASK], tools=[], role="grader"),
            event(SAY, input_refs=[[0, 1]], error="overloaded"),
        ],
    } | more  # fmt: skip


def archive(path: Path, members: dict[str, Any], compression=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, value in members.items():
            file.writestr(name, json.dumps(value))
    return path


HEADER = {"version": 2, "eval": {"task": "cities", "model": "m-1"}}


def check_inspect(tasks: list[dict[str, Any]]) -> None:
    assert targets(tasks) == ["get_weather", None]
    assert tasks[0]["messages"] == [ASK]
    assert tasks[1]["messages"] == [
        ASK,
        {"role": "assistant", "content": None, "reasoning_content": "Look.",
         "tool_calls": [called(arguments={"city": "Oslo"})]},
        {"role": "tool", "content": "Error: too slow", "tool_call_id": "c1", "name": "get_weather"},
    ]  # fmt: skip
    assert tasks[0]["tools"] == [WEATHER, HOTEL]


def test_model_events_of_an_archive_are_decisions(tmp_path):
    members = {"header.json": HEADER, "samples/s1_epoch_1.json": sample(), "../../escape.json": {}}
    path = archive(tmp_path / "log.eval", members)
    tasks, left = taken("inspect", path)
    check_inspect(tasks)
    assert [task["id"] for task in tasks] == ["s1.1", "s1.2"]
    assert tasks[0]["metadata"]["log"]["task"] == "cities"
    assert left == [
        "shows no tools: give their definitions with --tools",
        "message 2 (assistant) failed (overloaded)",
    ]


def test_a_json_log_says_what_its_archive_says(tmp_path):
    path = tmp_path / "log.json"
    path.write_text(json.dumps(HEADER | {"samples": [sample()]}))
    check_inspect(taken("inspect", path)[0])


def test_a_chunked_sample_is_put_together(tmp_path):
    whole = sample()
    pool = json.loads(json.dumps(whole["events_data"]["messages"]).replace("a" * 32, "1"))
    prefix = "samples/s1_epoch_1/"
    shell = {"id": "s1", "epoch": 1, "message_refs": [[0, 1], [2, 4]]}
    members = {
        "header.json": HEADER,
        f"{prefix}sample.json": shell,
        f"{prefix}messages/0.json": pool[:3],
        f"{prefix}messages/3.json": pool[3:],
        f"{prefix}events/0.json": whole["events"],
        f"{prefix}events/stats.json": {},
        f"{prefix}attachments/0.json": ["unused", ASK["content"]],
    }
    check_inspect(taken("inspect", archive(tmp_path / "log.eval", members))[0])
    (replay,), _ = taken("inspect", archive(tmp_path / "log.eval", members), kind="replay")
    assert [message["role"] for message in replay["messages"]] == ["user", "assistant", "tool"]
    del members[f"{prefix}messages/0.json"]
    with pytest.raises(BadInput, match="has a gap before"):
        taken("inspect", archive(tmp_path / "log.eval", members))


def test_members_that_are_compressed_by_zstandard_are_read(tmp_path):
    path = zstandard(tmp_path / "log.eval", {"header.json": HEADER, "samples/s1_epoch_1.json": sample()})
    check_inspect(taken("inspect", path)[0])
    path.write_bytes(path.read_bytes().replace(b"(\xb5/\xfd", b"(\xb5/\xfc"))
    with pytest.raises(BadInput, match="cannot be unpacked"):
        taken("inspect", path)


def zstandard(path: Path, members: dict[str, Any]) -> Path:
    """An archive as Inspect writes it: method 93, which this Python's zipfile can neither write nor read."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, value in members.items():
            raw = json.dumps(value).encode()
            packed = pyarrow.compress(raw, "zstd", asbytes=True)
            info = zipfile.ZipInfo(name)
            file.writestr(info, packed)
            info.compress_type, info.file_size, info.CRC = 93, len(raw), zlib.crc32(raw)
    return path


def test_an_archive_that_unpacks_too_far_is_refused_unread(tmp_path, monkeypatch):
    path = archive(
        tmp_path / "bomb.eval",
        {"samples/s1_epoch_1.json": "x" * 3_000_000, "samples/s2_epoch_1.json": sample()},
    )
    tasks, left = taken("inspect", path)
    assert len(tasks) == 2
    assert left[0] == "unpacks to more than 200 times its size"
    monkeypatch.setattr(files, "MAX_DOCUMENT", 100)
    with pytest.raises(BadInput, match="unpacks to more than 0 MiB"):
        taken("inspect", path)


def test_a_row_of_scout_is_a_transcript(tmp_path):
    columns = {
        key: [json.dumps(sample()[key])] for key in ("messages", "events", "events_data", "attachments")
    }
    table = pyarrow.table({"transcript_id": ["t1"], "model": ["m-1"], "task_set": ["cities"], **columns})
    path = tmp_path / "transcripts.parquet"
    pyarrow.parquet.write_table(table, path)
    tasks, left = taken("scout", path)
    check_inspect(tasks)
    assert len(left) == 2
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(BadInput, match="cannot be read as Parquet"):
        taken("scout", path)


# --- τ²-bench ---


def simulation(**more: Any) -> dict[str, Any]:
    flat = {"id": "c1", "name": "get_weather", "arguments": {"city": "Oslo"}, "requestor": "assistant"}
    messages = [
        {"role": "assistant", "content": "Hi! How can I help you today?"},
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [flat]},
        {
            "role": "tool",
            "tool_messages": [{"role": "tool", "id": "c1", "content": "3", "requestor": "assistant"}],
        },
        {"role": "user", "content": None, "tool_calls": [flat | {"id": "u1", "requestor": "user"}]},
        {"role": "tool", "id": "u1", "content": "secret", "requestor": "user"},
        SAY,
    ]
    return {
        "id": "sim-1",
        "task_id": "7",
        "trial": 0,
        "messages": messages,
        "reward_info": {"reward": 1.0},
    } | more


def results(**more: Any) -> dict[str, Any]:
    signatures = {
        t["name"]: {"name": t["name"], "doc": t["description"], "params": CITY} for t in (WEATHER, HOTEL)
    }
    environment = {"domain_name": "travel", "policy": "Be brief.", "tool_defs": signatures}
    return {"info": {"environment_info": environment, "agent_info": {"llm": "m-1"}}, "tasks": []} | more


def test_a_simulation_is_what_its_agent_saw_and_did(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps(results(simulations=[simulation(), {"id": "v", "messages": None, "ticks": [{}]}]))
    )
    tasks, left = taken("tau2", path)
    assert targets(tasks) == ["get_weather", None]
    assert "secret" not in json.dumps(tasks)
    assert [message["role"] for message in tasks[1]["messages"]] == [
        "system",
        "assistant",
        "user",
        "assistant",
        "tool",
    ]
    assert tasks[1]["messages"][4] == {"role": "tool", "content": "3", "tool_call_id": "c1"}
    assert tasks[0]["metadata"]["log"]["reward"] == 1.0
    assert tasks[0]["tools"] == [WEATHER, HOTEL]
    assert left == ["is of speech, in ticks"]


def test_simulations_beside_their_results_are_read_once(tmp_path):
    (tmp_path / "simulations").mkdir()
    (tmp_path / "simulations" / "sim-1.json").write_text(json.dumps(simulation()))
    (tmp_path / "results.json").write_text(json.dumps(results(simulations=[])))
    tasks, left = taken("tau2", tmp_path)
    assert (targets(tasks), left) == (["get_weather", None], [])


def test_a_log_without_definitions_takes_those_of_a_catalogue(tmp_path):
    bare = results(simulations=[simulation()])
    del bare["info"]["environment_info"]["tool_defs"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(bare))
    with pytest.raises(BadInput, match="give their definitions with --tools"):
        taken("tau2", path)
    catalogue = tmp_path / "tools.json"
    catalogue.write_text(json.dumps([WEATHER, HOTEL]))
    assert targets(taken("tau2", path, tools=catalogue)[0]) == ["get_weather", None]


def test_a_list_of_trajectories_is_read_and_what_is_none_is_named(tmp_path):
    path, catalogue = tmp_path / "results.json", tmp_path / "tools.json"
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
    }
    traj = [
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    path.write_text(
        json.dumps([{"task_id": 3, "trial": 0, "reward": 1.0, "traj": traj}, {"task_id": 4}, "x"])
    )
    catalogue.write_text(json.dumps([WEATHER]))
    tasks, left = taken("tau2", path, tools=catalogue)
    assert targets(tasks) == ["get_weather"]
    assert left == ["has no traj: is it a result of τ-bench?"] * 2


# --- MCP ---


def test_answers_of_a_server_are_a_catalogue(tmp_path):
    def listed(*tools: Any, **more: Any) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": 1, "result": {"tools": list(tools), **more}}

    spelled = [{"name": t["name"], "description": t["description"], "inputSchema": CITY, "title": "T", "outputSchema": {}}
               for t in (WEATHER, HOTEL)]  # fmt: skip
    path = jsonl(
        tmp_path / "mcp.jsonl",
        {"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
        listed(spelled[0], nextCursor="2"),
        listed(spelled[1], spelled[0], spelled[0] | {"description": "other"}),
    )
    output = tmp_path / "catalogue.json"
    imported = probe.import_tasks("mcp", path, output)
    assert imported.tasks == [WEATHER, HOTEL]
    assert list(read_catalogue(output)) == ["get_weather", "find_hotel"]
    assert [item.reason for item in imported.account.skipped] == [
        "is no answer to tools/list",
        '"get_weather" is in the catalogue already, and alike',
        'defines the tool "get_weather" twice, and not alike',
    ]
    with pytest.raises(UsageError, match="ends in .json or .jsonl"):
        probe.import_tasks("mcp", path, tmp_path / "catalogue.txt")


# --- data sets ---

XLAM = {
    "id": 3,
    "query": ASK["content"],
    "tools": json.dumps(
        [
            {"name": "get.weather", "description": "Weather.",
             "parameters": {"city": {"type": "str", "description": "Where."},
                            "days": {"type": "List[int], optional", "description": "When.", "default": "1"}}}
        ]
    ),
    "answers": json.dumps([{"name": "get.weather", "arguments": {"city": "Oslo"}}]),
}  # fmt: skip
HERMES = {
    "conversations": [
        {"from": "system", "value": "You are a function calling AI model. <tools>" + json.dumps(TOOLS) + "</tools>"},
        {"from": "human", "value": ASK["content"]},
        {"from": "gpt", "value": "<tool_call>\n{'name': 'get_weather', 'arguments': {'city': 'Oslo'}}\n</tool_call>"},
        {"from": "tool", "value": "<tool_response>\n{\"temp\": 3}\n</tool_response>"},
        {"from": "gpt", "value": "It is 3 degrees."},
    ],
    "tools": json.dumps(TOOLS),
}  # fmt: skip
GLAIVE = {
    "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    + json.dumps(WEATHER) + "\n" + json.dumps(HOTEL),
    "chat": "USER: " + ASK["content"] + "\n\n\nASSISTANT: <functioncall> {\"name\": \"get_weather\", \"arguments\": "
    "'{\"city\": \"Oslo\"}'} <|endoftext|>\n\n\nFUNCTION RESPONSE: {\"temp\": 3}\n\n\n"
    "ASSISTANT: It is 3 degrees. <|endoftext|>\n\n\n",
}  # fmt: skip
TOOLACE = {
    "system": "You are an expert. Here is a list of functions in JSON format that you can invoke:\n"
    + json.dumps([{"name": "City Weather API", "description": "Weather.", "required": None,
                   "parameters": {"type": "dict", "properties": {"city": {"type": "string"}}, "required": ["city"]}}])
    + "\nPut it in the format of [func1(params_name=params_value)].",
    "conversations": [
        {"from": "user", "value": ASK["content"]},
        {"from": "assistant", "value": '[City Weather API(city="Oslo")]'},
        {"from": "tool", "value": '[{"temp": 3}]'},
        {"from": "assistant", "value": "It is 3 degrees."},
    ],
}  # fmt: skip
SHAREGPT = {
    "system": "Be brief.",
    "tools": json.dumps([WEATHER, HOTEL]),
    "conversations": [
        {"from": "human", "value": ASK["content"]},
        {
            "from": "function_call",
            "value": json.dumps({"name": "get_weather", "arguments": {"city": "Oslo"}}),
        },
        {"from": "observation", "value": '{"temp": 3}'},
        {"from": "gpt", "value": "It is 3 degrees."},
    ],
}


@pytest.mark.parametrize(
    ("row", "expected", "shown"),
    [
        (XLAM, ["get.weather"], ["get.weather"]),
        (HERMES, ["get_weather", None], ["get_weather", "find_hotel"]),
        (GLAIVE, ["get_weather", None], ["get_weather", "find_hotel"]),
        (TOOLACE, ["City_Weather_API", None], ["City_Weather_API"]),
        (SHAREGPT, ["get_weather", None], ["get_weather", "find_hotel"]),
        ({"messages": json.dumps(TALK), "tools": json.dumps(TOOLS)}, ["get_weather", None], ["get_weather", "find_hotel"]),
    ],
    ids=["xlam", "hermes", "glaive", "toolace", "sharegpt", "openai"],
)  # fmt: skip
def test_a_row_of_a_data_set_is_a_conversation(tmp_path, row, expected, shown):
    tasks, left = taken("hf", jsonl(tmp_path / "rows.jsonl", row))
    assert left == []
    assert targets(tasks) == expected
    assert [tool["name"] for tool in tasks[0]["tools"]] == shown
    answer = tasks[0]["metadata"]["log"]["said"]["tool_calls"][0]["function"]["arguments"]
    assert (json.loads(answer) if isinstance(answer, str) else answer) == {"city": "Oslo"}
    asked = [message for message in tasks[-1]["messages"] if message["role"] != "system"]
    assert asked[0] == ASK
    if len(tasks) > 1:
        assert asked[1]["tool_calls"][0]["function"]["name"] == expected[0]
        assert asked[1]["tool_calls"][0]["id"] == asked[2]["tool_call_id"]
        assert json.loads(asked[2]["content"]) in ({"temp": 3}, [{"temp": 3}])


def test_a_system_text_that_lists_the_tools_stays_with_the_log(tmp_path):
    tasks, _ = taken("hf", jsonl(tmp_path / "rows.jsonl", TOOLACE, SHAREGPT))
    assert tasks[0]["messages"] == [ASK]
    assert tasks[0]["metadata"]["log"]["system"] == TOOLACE["system"]
    assert tasks[0]["metadata"]["log"]["names"] == {"City_Weather_API": "City Weather API"}
    assert tasks[2]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_list_and_a_table_of_rows_say_the_same(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.json").write_text(json.dumps([XLAM, XLAM | {"id": 4}]))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([XLAM, XLAM | {"id": 4}]), tmp_path / "rows.parquet"
    )
    tables = [taken("hf", path)[0] for path in (tmp_path / "a", tmp_path / "rows.parquet")]
    assert [[task["id"] for task in tasks] for tasks in tables] == [["3", "4"]] * 2
    assert [task["tools"] for task in tables[0]] == [task["tools"] for task in tables[1]]


def test_a_row_without_an_answer_wants_no_call_and_an_unknown_call_is_no_silence(tmp_path):
    unknown = [
        {"from": "user", "value": "x"},
        {"from": "assistant", "value": '[Other Thing(city="Oslo"), other(x=1)]'},
    ]
    rows = [XLAM | {"answers": "[]"}, TOOLACE | {"conversations": unknown}]
    tasks, left = taken("hf", jsonl(tmp_path / "rows.jsonl", *rows))
    assert targets(tasks) == [None]
    assert len(left) == 1


def test_null_columns_of_a_table_are_no_properties():
    table = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": None}, "other": None},
        "required": ["city"],
    }
    assert parameters(table, "f") == CITY


@pytest.mark.parametrize(
    ("words", "schema"),
    [
        ("str", {"type": "string"}), ("str, optional", {"type": "string"}), ("Optional[int]", {"type": "integer"}),
        ("List[int]", {"type": "array", "items": {"type": "integer"}}), ("Dict[str, Any]", {"type": "object"}),
        ("List[Tuple[int, str]]", {"type": "array", "items": {"type": "array"}}), ("Any", {}), ("Callable[[float], float]", {}),
        ("List[List[str]]", {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}),
        ("Union[int, str]", {"type": ["integer", "string"]}), ("int | None", {"type": ["integer", "null"]}),
        ("set", {"type": "array"}), ("str, default 'x'", {"type": "string"}), ("number", {"type": "number"}),
    ],
)  # fmt: skip
def test_words_of_types_are_those_of_json_schema(words, schema):
    assert typed(words) == schema


def test_parameters_without_a_schema_around_them_get_one():
    flat = {
        "city": {"type": "str"},
        "type": {"type": "str", "default": "x"},
        "days": {"type": "int, optional"},
    }
    assert parameters(flat, "f") == {
        "type": "object",
        "properties": {"city": {"type": "string"}, "type": {"type": "string", "default": "x"}, "days": {"type": "integer"}},
        "required": ["city"],
    }  # fmt: skip
    assert parameters(CITY, "f") == CITY


# --- vLLM ---


def generated(**more: Any) -> dict[str, Any]:
    logprobs = [{"7": {"logprob": -0.5, "rank": 1}, "9": {"logprob": -2.0}}, {"8": {"logprob": -0.25}}]
    output = {"index": 0, "text": " warm", "token_ids": [7, 8], "logprobs": logprobs, "finish_reason": "stop"}
    return {"request_id": "r1", "prompt": "It is", "prompt_token_ids": [1, 2], "outputs": [output | more]}


def test_token_ids_and_log_probabilities_are_kept_as_they_are(tmp_path):
    (task,), left = taken("vllm", jsonl(tmp_path / "out.jsonl", generated() | {"tools": TOOLS}))
    assert task["kind"] == "replay"
    assert (task["token_ids"], task["logprobs"]) == ([1, 2, 7, 8], [-0.5, -0.25])
    assert task["emitted"] == [[2, 4]]
    assert task["messages"] == [
        {"role": "user", "content": "It is"},
        {"role": "assistant", "content": " warm"},
    ]
    assert left == []


def test_answers_of_the_server_have_the_messages_of_their_request(tmp_path):
    answer = completion(CALL, prompt_token_ids=[1, 2])
    answer["choices"][0] |= {
        "token_ids": [7, 8],
        "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]},
    }
    path = jsonl(tmp_path / "log.jsonl", {"request": {"messages": [ASK], "tools": TOOLS}, "response": answer})
    (task,), _ = taken("vllm", path)
    assert (task["messages"], task["token_ids"], task["logprobs"]) == (
        [ASK, CALL],
        [1, 2, 7, 8],
        [-1.0, -2.0],
    )
    assert targets(taken("vllm", path, kind="tool_selection")[0]) == ["get_weather"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"token_ids": None}, "has no token ids"),
        ({"token_ids": [7, -1]}, "no list of whole numbers"),
        ({"token_ids": [7]}, "not one for each token"),
        (
            {"logprobs": [{"9": {"logprob": -2.0}}, {"8": {"logprob": -0.25}}]},
            "no log-probability for a token",
        ),
    ],
)
def test_tokens_that_do_not_fit_are_left_out(tmp_path, more, reason):
    _, left = taken("vllm", jsonl(tmp_path / "out.jsonl", generated(**more), generated() | {"tools": TOOLS}))
    assert len(left) == 1
    assert reason in left[0]


# --- hostile and broken files, and the command ---


def test_a_broken_line_costs_itself_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    good = json.dumps(exchange([ASK], CALL)).encode()
    deep = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    nul = json.dumps(exchange([{"role": "user", "content": "a\0b"}], CALL)).encode()
    surrogate = good.replace(b"How warm", b"\\ud800")
    lines = [good, b"{", b'{"a": 1, "a": 2}', b"\xff\xfe", deep, nul, surrogate, b"", b"[" * 50, good]
    path.write_bytes(b"\n".join(lines))
    tasks, left = taken("openai", path)
    assert [task["id"] for task in tasks] == ["chatcmpl-1", "chatcmpl-1_2"]
    for reason, part in zip(
        left, ("no JSON", 'key "a" twice', "UTF-8", "deep", "NUL", "surrogate", "no JSON"), strict=True
    ):
        assert part in reason


def test_ids_are_inert_and_each_its_own(tmp_path):
    line = exchange([ASK], CALL)
    line["response"]["id"] = "../../\x1b[2J" + "x" * 500
    tasks, _ = taken("openai", jsonl(tmp_path / "log.jsonl", line, line))
    assert len({task["id"] for task in tasks}) == 2
    assert all(task["id"].isprintable() and len(task["id"]) < 130 for task in tasks)


def test_the_command_writes_tasks_and_says_what_it_left_out(tmp_path):
    path = jsonl(tmp_path / "log.jsonl", exchange([ASK], CALL), exchange([ASK], CALL, tools=[]))
    output = tmp_path / "tasks.jsonl"
    ran = CliRunner().invoke(main, ["tasks", "import", "openai", str(path), "-o", str(output)])
    assert ran.exit_code == 0, ran.output
    assert len(read_tasks(output, None).tasks) == 1
    assert f"left out {path}:2 turn 1: shows no tools" in ran.stderr
    assert "  tasks                    1" in ran.stderr.splitlines()
    assert ran.stdout == f"{output}\n"
    answer = CliRunner().invoke(main, ["tasks", "import", "openai", str(path), "-o", str(output), "--json"])
    document = json.loads(answer.stdout)
    assert (document["records"], document["decisions"], document["tasks"]) == (2, 2, 1)
    assert document["left_out"] == [
        {"place": f"{path}:2", "turn": 1, "reason": "shows no tools: give their definitions with --tools"}
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["openai", "missing.jsonl"], 3, "give a file or folder that exists"),
        (["openai", "."], 3, "has no file that ends in"),
        (["openal", "log.jsonl"], 2, "give one of openai, anthropic"),
        (["openai", "log.jsonl", "--category", "multiple"], 2, "--category is for bfcl"),
        (["bfcl", "."], 2, "--category is needed"),
        (["mcp", "log.jsonl", "--as", "replay"], 2, "has no such kind"),
        (["openai", "log.txt"], 3, "is no JSON"),
    ],
)
def test_a_command_that_can_take_nothing_says_why_and_writes_nothing(
    tmp_path, monkeypatch, arguments, code, words
):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    (Path.cwd() / "log.txt").write_text("no log")
    ran = CliRunner().invoke(main, ["tasks", "import", *arguments, "-o", "out.jsonl"])
    assert (ran.exit_code, words in ran.stderr) == (code, True), ran.output
    assert not Path("out.jsonl").exists()


def test_every_format_is_named_where_it_is_documented():
    page = (
        (Path(__file__).parent.parent / "tasks" / "README.md")
        .read_text()
        .partition("## Bring your own logs")[2]
    )
    assert [name for name in FORMATS if f"| `{name}` |" not in page] == []
