"""Transcripts of a log, teacher-forced: the numbers of the run that wrote them, and how far another model agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from probe.capture import SITES, Capturer, CaptureSpec, Generation, Prefixes, plan_shared, run_batch
from probe.capture import turns as scoring
from probe.errors import BadInput
from probe.maths.agreement import AGREEMENT, replay_agreement
from probe.prompts import PromptFault
from probe.tasks import Message, jobs, read_tasks, record, render, replay_of
from probe.tasks.replay import ReplayTask
from tests.conftest import tiny
from tests.test_agent import CALL, END, SHOWN, dictate, task, written  # noqa: F401
from tests.test_agent import run as run_agents
from tests.test_capture import PARITY, relative

TURNS = ("tool_probabilities", "position", "start", "end", "text", "slot", "called", "opener_log_prob")


def replayed(model, *tasks: ReplayTask, sites=SITES) -> list:
    """(outcome, record) of each task, run in one batch."""
    prompts = [render(each, model.codec, max_new_tokens=1) for each in tasks]
    work = [job for each, shown in zip(tasks, prompts, strict=True) for job in jobs(each, shown)]
    outcomes = run_batch(model, model.codec, work, CaptureSpec(frozenset(sites)), Generation(1))
    return [
        (outcome, record(each, shown, [outcome], 0.0))
        for each, shown, outcome in zip(tasks, prompts, outcomes, strict=True)
    ]


def read(tmp_path: Path, *lines: dict) -> list[ReplayTask]:
    path = tmp_path / "replay.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return list(read_tasks(path, None).tasks)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model():
    return tiny("tiny-llama")


@pytest.fixture
def lived(model, dictate, tmp_path):  # noqa: F811
    """An agent's transcript, what was captured of it, and the task that replays it."""
    dictate(model, {"a": [CALL + END, written("kv_store", {"action": "list"}) + END, "It is 42." + END]})
    ((outcome, entry),) = run_agents(model, task(answer=42), sites=SITES)
    (again,) = read(tmp_path, replay_of(task(answer=42), entry))
    return outcome, entry, again


def close(new, old) -> None:
    for now, was in zip(new["tool_probabilities"], old["tool_probabilities"], strict=True):
        assert now["token_ids"] == was["token_ids"] and now["tool"] == was["tool"]
        assert now["log_prob"] == pytest.approx(was["log_prob"], abs=1e-4)
    for name in TURNS[1:-1]:
        assert new[name] == old[name], name
    assert new["opener_log_prob"] == pytest.approx(old["opener_log_prob"], abs=1e-4)


def test_replay_of_a_runs_own_transcript_gives_its_numbers(model, lived):
    was, old, again = lived
    ((now, new),) = replayed(model, again)
    assert new["token_ids"] == old["token_ids"] and new["n_prompt"] == old["n_prompt"]
    assert [tuple(span[k] for k in ("label", "start", "end")) for span in new["spans"]] == [
        tuple(span[k] for k in ("label", "start", "end")) for span in old["spans"]
    ]
    assert new["n_turns"] == old["n_turns"] == 3
    for turn, earlier in zip(new["turns"], old["turns"], strict=True):
        close(turn, earlier)
        assert turn.get("result", {}).get("content") == earlier.get("result", {}).get("content")
    assert (new["ended_by"], new["finish_reason"], new["answer"]) == ("answer", "eos", "It is 42.")
    assert was.tensors.keys() == now.tensors.keys()
    for name, tensor in was.tensors.items():
        assert relative(now.tensors[name].float(), tensor.float()) <= PARITY, name
    emitted = new["replay_agreement"]["n_tokens"]
    assert emitted == sum(turn["end"] - turn["start"] for turn in old["turns"]) + 1


def test_turns_are_found_in_the_tokens_of_a_log(model, lived):
    _, old, again = lived
    line = dict(again.raw)
    del line["emitted"]
    task = ReplayTask(id="r", messages=again.messages, tools=again.tools, token_ids=again.token_ids, raw=line)
    ((_, new),) = replayed(model, task, sites=("log_probs",))
    for turn, earlier in zip(new["turns"], old["turns"], strict=True):
        close(turn, earlier)
    assert new["replay_agreement"]["n_tokens"] == sum(t["end"] + 1 - t["start"] for t in old["turns"])


def test_many_decisions_are_scored_as_few_at_a_time_are(model, lived, monkeypatch):
    *_, again = lived
    ((_, together),) = replayed(model, again, sites=("logits",))
    monkeypatch.setattr(scoring, "SIDE_TOKENS", 1)
    ((outcome, apart),) = replayed(model, again, sites=("logits",))
    for alone, other in zip(apart["turns"], together["turns"], strict=True):
        close(alone, other)
    assert outcome.tensors["decisions"].tolist() == [turn["position"] for turn in apart["turns"]]


TALK = (
    Message("system", "Be brief."),
    Message("user", "What is 6 * 7?"),
    Message(
        "assistant",
        "",
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "calculator", "arguments": '{"expression": "6 * 7"}'},
                }
            ],
        },
    ),
    Message("tool", "42", {"role": "tool", "tool_call_id": "c1", "content": "42"}),
    Message("assistant", "It is 42."),
)


def test_a_conversation_is_rendered_and_every_message_call_and_result_is_labelled(model):
    task = ReplayTask(id="r", messages=(*TALK, Message("user", "Thanks!")), tools=SHOWN)
    ((outcome, entry),) = replayed(model, task)
    shown = {}
    for span in entry["spans"]:
        shown.setdefault(span["label"], []).append(span["text"])
    assert (shown["step:1"], shown["result:1"], shown["answer"]) == ([CALL], ["42"], ["It is 42."])
    assert shown["user"] == ["What is 6 * 7?"]
    assert entry["template"]["left_out"] == "1 messages behind the last turn of the assistant"
    first, last = entry["turns"]
    assert (first["called"], first["slot"], last["called"], last["slot"]) == (
        "calculator",
        "reached",
        None,
        "attached",
    )
    assert first["result"] == {"content": "42", "seconds": 0.0, "shown": True}
    # One forward of the same tokens: log P of every emitted token, and which are the argmax.
    ids = entry["token_ids"]
    with torch.no_grad():
        logits = model.hf(torch.tensor([ids])).logits[0].float()
    assert entry["replay_agreement"]["n_tokens"] == sum(t["end"] + 1 - t["start"] for t in entry["turns"])
    assert outcome.tensors["log_probs"].shape == (entry["n_new"],)
    best = logits.argmax(-1).tolist()
    places = [p for t in entry["turns"] for p in range(t["start"], t["end"] + 1)]
    share = sum(best[p - 1] == ids[p] for p in places) / len(places)
    assert entry["replay_agreement"]["argmax_share"] == pytest.approx(share)


def test_every_call_of_a_turn_is_scored_where_its_name_stands(model):
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(
            [("calculator", '{"expression": "6 * 7"}'), ("kv_store", '{"action": "list"}')]
        )
    ]
    spoken = Message("assistant", "", {"role": "assistant", "content": None, "tool_calls": calls})
    results = [
        Message("tool", "42", {"role": "tool", "tool_call_id": f"c{n}", "content": "42"}) for n in range(2)
    ]
    task = ReplayTask(id="r", messages=(*TALK[:2], spoken, *results, TALK[4]), tools=SHOWN)
    ((outcome, entry),) = replayed(model, task, sites=("log_probs", "logits"))
    first, last = entry["turns"]
    assert [call["name"] for call in first["calls"]] == ["calculator", "kv_store"]
    (further,) = first["further_calls"]
    assert further["called"] == "kv_store" and "further_calls" not in last
    ids, at = entry["token_ids"], further["position"]
    assert first["position"] < at < first["end"]
    with torch.no_grad():
        for choice in further["tool_probabilities"]:
            joint = [*ids[: at + 1], *choice["token_ids"]]
            log_probs = model.hf(torch.tensor([joint])).logits[0].float().log_softmax(-1)
            wanted = [log_probs[at + k, token].item() for k, token in enumerate(choice["token_ids"])]
            assert choice["token_log_probs"] == pytest.approx(wanted, abs=1e-4)
            if choice["tool"] == "kv_store":
                assert joint == ids[: len(joint)]
    assert outcome.tensors["decisions"].tolist() == [turn["position"] for turn in entry["turns"]]


def test_agreement_is_the_share_of_argmax_and_the_gaps_to_the_log():
    emitted = [(-0.5, True), (-1.0, False), (-2.0, True), (-0.1, True)]
    assert replay_agreement(emitted, ()) == {"n_tokens": 4, "argmax_share": 0.75, "disagrees": False}
    agreement = replay_agreement(emitted, (-0.5, -1.1, None, -0.1))
    assert agreement["n_log_probs"] == 3
    assert agreement["mean_delta_log_prob"] == pytest.approx(0.1 / 3)
    assert agreement["largest_delta_log_prob"] == pytest.approx(0.1)
    assert not agreement["disagrees"]
    assert replay_agreement(emitted, [p - 2 * AGREEMENT for p, _ in emitted])["disagrees"]
    assert replay_agreement([(-1.0, False)] * 3, ())["disagrees"]
    assert replay_agreement(emitted, (-1.0,))["logprobs_left_out"] == "1 for 4 tokens"


def test_log_probabilities_of_the_model_itself_agree(model, lived):
    outcome, old, again = lived
    here = outcome.tensors["log_probs"].tolist()
    places = [p for start, end in again.emitted for p in range(start, end)]
    logged = tuple(here[p - old["n_prompt"]] for p in places)
    told = ReplayTask(
        id="r",
        messages=again.messages,
        tools=again.tools,
        token_ids=again.token_ids,
        emitted=again.emitted,
        logprobs=logged,
    )
    ((_, new),) = replayed(model, told, sites=("log_probs",))
    agreement = new["replay_agreement"]
    assert agreement["largest_delta_log_prob"] < 1e-4 and not agreement["disagrees"]


def test_a_run_of_a_replay_is_measured_as_an_agents_is(model, lived, tmp_path):
    import probe

    *_, again = lived
    path = tmp_path / "replay.jsonl"
    path.write_text(
        json.dumps(again.raw | {"logprobs": [None, *[-1.0] * (sum(e - s for s, e in again.emitted) - 1)]})
        + "\n"
    )
    run = probe.run(path, model="random:tiny-llama", out=tmp_path / "run")
    rows = run.measures()
    of_turns = rows[(rows.analyzer == "tool") & (rows.name == "candidate_mass")]
    assert of_turns.step.tolist() == [1, 2, 3]
    agreement = run["a"].record["replay_agreement"]
    for name, key in (
        ("replay_argmax_share", "argmax_share"),
        ("replay_delta_log_prob", "mean_delta_log_prob"),
        ("replay_largest_delta_log_prob", "largest_delta_log_prob"),
    ):
        assert rows[rows.name == name].value.tolist() == [agreement[key]]
    assert agreement["disagrees"] and agreement["n_log_probs"] == agreement["n_tokens"] - 1
    read = rows[(rows.analyzer == "cot") & (rows.name == "read_mass")]
    assert "result:1" in set(read.span)


def test_what_cannot_be_replayed_is_said(model, lived, tmp_path):
    *_, again = lived
    strange = ReplayTask(id="r", messages=again.messages, tools=SHOWN, token_ids=(10**6, 5))
    with pytest.raises(PromptFault, match="token 1000000 is not one of"):
        render(strange, model.codec, max_new_tokens=1)
    nowhere = ReplayTask(id="r", messages=again.messages, tools=SHOWN, token_ids=(5, 6, 7, 8))
    with pytest.raises(PromptFault, match='give "emitted"'):
        render(nowhere, model.codec, max_new_tokens=1)
    line = {
        "id": "a",
        "kind": "replay",
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"name": "f"}],
    }
    for changed, told in (
        ({}, "have no turn of the assistant"),
        ({"emitted": [[1, 2]]}, 'emitted: given without "token_ids"'),
        ({"token_ids": [1, 2], "emitted": [[1, 4]]}, "does not follow on"),
        ({"token_ids": [1, 2], "emitted": [[1, 2]], "logprobs": [0.5]}, "no log-probability is above 0"),
        ({"target": "f"}, "target: unknown field"),
    ):
        with pytest.raises(BadInput, match="replay.jsonl") as caught:
            read(tmp_path, line | changed)
        assert told in str(caught.value)


def conversation(n_calls: int) -> list[dict]:
    """A talk of so many calls, each with a result, and the answer."""
    out: list[dict] = [
        {"role": "user", "content": "Add what I say, one after the other, and be quick about it."}
    ]
    for number in range(n_calls):
        called = {"name": "calculator", "arguments": json.dumps({"expression": f"{number} + {number * 7}"})}
        out.append(
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": f"c{number}", "type": "function", "function": called}],
            }
        )
        out.append(
            {"role": "tool", "tool_call_id": f"c{number}", "content": f"{number * 8}, which is step {number}"}
        )
    return [*out, {"role": "assistant", "content": "That is all of it."}]


def decisions(model, tmp_path, n: int, *, from_first: bool) -> list[ReplayTask]:
    """A log as one task for each of its decisions: each goes on where the one before ended. What the model emitted is the last
    turn of each, or all of them."""
    talk, tasks = conversation(n - 1), []
    (whole,) = read(
        tmp_path,
        {"id": "w", "kind": "replay", "messages": talk, "tools": [tool.document() for tool in SHOWN]},
    )
    (prompt,) = render(whole, model.codec, max_new_tokens=1)
    ids, turns = [*prompt.token_ids, prompt.given.last], prompt.given.turns
    for number, turn in enumerate(turns, 1):
        end = turn.end + turn.ended
        ranges = [(t.start, t.end + t.ended) for t in turns[:number]]
        spoken = 2 * number
        tasks.append(
            ReplayTask(
                id=f"d{number}",
                messages=whole.messages[:spoken],
                tools=whole.tools,
                token_ids=tuple(ids[:end]),
                emitted=tuple(ranges if from_first else ranges[-1:]),
            )
        )
    return tasks


@pytest.mark.parametrize("from_first", [False, True])
def test_transcripts_that_continue_each_other_run_their_tokens_once(model, tmp_path, monkeypatch, from_first):
    tasks = decisions(model, tmp_path, 10, from_first=from_first)
    counted: list[int] = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, pieces, *rest, **named: (
            counted.append(sum(len(p.tokens) for p in pieces)),
            forward(self, pieces, *rest, **named),
        )[1],
    )
    together = replayed(model, *tasks)
    shared = sum(counted)
    counted.clear()
    apart = [replayed(model, task)[0] for task in tasks]
    beside = sum(counted) - sum(len(outcome.token_ids) - 1 for outcome, _ in apart)
    # What is scored on the side is run for each; of the rest the longest has all, and each other one its last token again.
    longest = len(tasks[-1].token_ids) - 1
    assert longest <= shared - beside <= longest + len(tasks)
    for (now, entry), (was, earlier) in zip(together, apart, strict=True):
        for turn, other in zip(entry["turns"], earlier["turns"], strict=True):
            close(turn, other)
        assert entry["replay_agreement"]["argmax_share"] == earlier["replay_agreement"]["argmax_share"]
        assert now.tensors.keys() == was.tensors.keys()
        for name, tensor in was.tensors.items():
            assert relative(now.tensors[name].float(), tensor.float()) <= PARITY, name


def test_states_that_a_prefix_keeps_count_for_its_memory(model, tmp_path):
    tasks = decisions(model, tmp_path, 4, from_first=True)
    work = [job for each in tasks for job in jobs(each, render(each, model.codec, max_new_tokens=1))]
    plan_shared(work)
    prefixes = Prefixes()
    capturer = Capturer(model, model.codec, CaptureSpec(frozenset(SITES)), Generation(1), prefixes)
    capturer.expect([[each] for each in work], range(len(work)))
    capturer.run(work[:1], lambda *_: None)
    held = prefixes.size
    (entry,) = [prefix.entry for prefix in prefixes._held.values()]
    assert entry is not None and entry.rows is not None
    kept = sum(t.nbytes for by_layer in entry.rows.states.values() for t in by_layer.values())
    assert held == entry.size > entry.memory.nbytes + kept > entry.memory.nbytes
    assert capturer.prefixes.bytes_of_row * len(entry.rows.hidden) == kept + entry.rows.hidden.nbytes
    for each in work[1:]:
        capturer.run([each], lambda *_: None)
    assert prefixes.size == 0
