"""From what a passage gave to what the record says: P(tool|context), the choice, the call, the score."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from probe.capture import ANSWER_TOKENS, Job, Outcome, Turn
from probe.harness.agent import Episode
from probe.prompts import ANSWER_CUE, Prompt, announces_answer
from probe.tasks.schema import AgentTask, CotTask, PromptingTask, Task, ToolTask
from probe.tools.calls import judge, read_calls
from probe.tools.calls.bfcl import BfclVerdict, bfcl_verdict
from probe.tools.definitions import Tool

if TYPE_CHECKING:
    from probe.tools.execution import Executable

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_ALONE = re.compile(rf"(?<![\w.,])(?:{_NUMBER.pattern})(?![\w]|[.,]\d)")
_ARTICLES = ("a", "an", "the")
_OUTER_MARKS = ".,;:!?\"'`()[]{}*_“”‘’«»…。！？、"
# A template that writes such a mark before the call says itself that a call follows.
_MARKED = re.compile(r"\s*(?:<|\[TOOL_CALLS\]|```)")


def jobs(
    task: Task,
    prompts: Sequence[Prompt],
    tools: Mapping[str, Executable] | None = None,
    *,
    must_call: bool = False,
) -> list[Job]:
    """What the model has to do for a task: one job a passage, with its stopping rule.

    `tools` is what an agent's calls can execute (None: all that is installed). With `must_call` an agent's first
    turn begins with the opener of a call.
    """
    found = []
    for prompt in prompts:
        job = Job(prompt, task.id, task_kind(task))
        if isinstance(task, ToolTask) and prompt.call_prefix is not None:
            job.finished = partial(_call_closed, prompt)
        if isinstance(task, AgentTask):
            job.converse = partial(Episode, task, prompt, tools)
            job.max_turns = task.max_turns
            job.must_call = must_call
        if isinstance(task, CotTask):
            job.announces = announces_answer
            job.answer_tokens = ANSWER_TOKENS
            job.answer_cue = None if prompt.forced_steps else ANSWER_CUE
        found.append(job)
    return found


def task_kind(task: Task) -> str:
    kinds = {PromptingTask: "prompting", ToolTask: "tool_selection", AgentTask: "agent", CotTask: "cot"}
    return kinds[type(task)]


def record(
    task: Task, prompts: Sequence[Prompt], outcomes: Sequence[Outcome], seconds: float
) -> dict[str, Any]:
    """The task's record.json (docs/contract.md, section 5). `score` is absent without a target."""
    truncated = any(prompt.truncation for prompt in prompts)
    out: dict[str, Any] = {
        "id": task.id,
        "kind": task_kind(task),
        "status": "truncated" if truncated else "ok",
        "seconds": round(seconds, 4),
    }
    if task.metadata is not None:
        out["metadata"] = task.metadata
    if isinstance(task, PromptingTask):
        out |= _prompting(task, prompts, outcomes)
    else:
        out |= _passage(prompts[0], outcomes[0])
        if isinstance(task, CotTask):
            out |= _cot(task, outcomes[0])
        elif isinstance(task, AgentTask):
            out |= _agent(task, prompts[0], outcomes[0])
        else:
            out |= _tools(task, prompts[0], outcomes[0])
    if isinstance(task, ToolTask) and (verdict := _bfcl(task, prompts[0], outcomes[0])):
        out["bfcl"] = asdict(verdict)
    return out


def error_record(task: Task, status: str, message: str, seconds: float) -> dict[str, Any]:
    """The record of a task that could not be run to its end."""
    out = {
        "id": task.id,
        "kind": task_kind(task),
        "status": status,
        "error": message,
        "seconds": round(seconds, 4),
    }
    target = task.answer if isinstance(task, CotTask) else task.target
    if target is not None or isinstance(task, ToolTask):
        out["target"] = target
    return out


def _passage(prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
    out = {
        "prompt": prompt.text,
        "token_ids": outcome.token_ids,
        "n_prompt": outcome.n_prompt,
        "n_new": outcome.n_new,
        "completion": outcome.completion,
        "finish_reason": outcome.finish_reason,
        "spans": [
            {"label": span.label, "start": span.start, "end": span.end, "text": text}
            for span, text in zip(outcome.spans, outcome.span_texts, strict=True)
        ],
        "template": prompt.template,
    }
    if prompt.truncation:
        out["truncation"] = prompt.truncation
    return out


# -- tool selection --------------------------------------------------------------------------------------------


def _tools(task: ToolTask, prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
    out: dict[str, Any] = {
        "target": task.raw.get("target"),
        **_shown(task, prompt),
        **_decision(prompt, outcome.candidate_token_log_probs, outcome.opener_log_prob),
        **read_call(prompt, outcome.completion, task.tools),
    }
    if outcome.opener_log_prob is not None:
        out["opener_log_prob"] = outcome.opener_log_prob
    right = out["chosen"] in task.targets if task.targets else out["chosen"] is None
    out["score"] = float(right)
    return out


def _shown(task: ToolTask | AgentTask, prompt: Prompt) -> dict[str, Any]:
    return {
        "call_prefix": prompt.call_prefix,
        "no_tool": prompt.no_tool,
        "tools": [tool.name for tool in task.tools],
    }


def _decision(
    prompt: Prompt, token_log_probs: Sequence[Sequence[float]], opener_log_prob: float | None
) -> dict[str, Any]:
    entries = tool_probabilities(prompt, token_log_probs, opener_log_prob)
    tools = [entry for entry in entries if entry["tool"] is not None]
    return {
        "tool_probabilities": entries,
        "chosen": max(entries, key=lambda entry: entry["probability"])["tool"],
        "chosen_tool": max(tools, key=lambda entry: entry["probability"])["tool"],
        "candidate_mass": math.fsum(math.exp(entry["log_prob"]) for entry in entries),
    }


def tool_probabilities(
    prompt: Prompt, token_log_probs: Sequence[Sequence[float]], opener_log_prob: float | None
) -> list[dict[str, Any]]:
    """Shown tools in shown order, then no-tool; log_prob in nats, probability = softmax over all entries.

    With a tool-aware template log P(opener) is added to every tool and no-tool is log(1 − P(opener)).
    """
    entries = [
        {
            "tool": candidate.name,
            "token_ids": list(candidate.token_ids),
            "token_log_probs": list(by_token),
            "log_prob": math.fsum(by_token),
        }
        for candidate, by_token in zip(prompt.candidates, token_log_probs, strict=True)
    ]
    if prompt.no_tool == "complement":
        assert opener_log_prob is not None
        for entry in entries:
            entry["log_prob"] += opener_log_prob
        # log(1 − p) by log1p(−exp) is exact near p = 0, by log(−expm1) near p = 1; p = 1 is kept finite.
        near_one = opener_log_prob > -math.log(2)
        gap = (
            math.log(max(-math.expm1(opener_log_prob), 1e-300))
            if near_one
            else math.log1p(-math.exp(opener_log_prob))
        )
        entries.append({"tool": None, "token_ids": [], "token_log_probs": [], "log_prob": gap})
    for group, name in ((entries, "probability"), (entries[:-1], "choice_probability")):
        for entry, probability in zip(group, _softmax([entry["log_prob"] for entry in group]), strict=True):
            entry[name] = probability
    return entries


def _softmax(log_probs: Sequence[float]) -> list[float]:
    top = max(log_probs)
    weights = [math.exp(value - top) for value in log_probs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _written(prompt: Prompt, completion: str) -> str:
    """The call that the opener began; a mark says that it is one where the template writes none."""
    opener = prompt.call_prefix or ""
    return opener + completion if _MARKED.match(opener) else "<tool_call>" + opener + completion


def _call_closed(prompt: Prompt, completion: str) -> bool:
    """Whether the call that the opener began is complete, or the line has ended on which its name is quoted."""
    if "\n" in completion and (prompt.call_prefix or "").endswith('"'):
        return True
    if not completion.rstrip().endswith(("}", "]", ">", ")")):
        return False
    calls = read_calls(_written(prompt, completion))
    return bool(calls) and calls[0].complete


def read_call(prompt: Prompt, completion: str, tools: Sequence[Tool]) -> dict[str, Any]:
    """`called` (name, or null for no tool or no readable call) and the call's arguments as generated.

    A call that is not a right call of a shown tool also has `call_error`, a sentence, and `call_error_kind`, one
    of `probe.tools.calls.KINDS`.
    """
    calls = read_calls(_written(prompt, completion), tools=tools)
    name = calls[0].name if calls else None
    if name is not None and name == prompt.template.get("no_tool_name"):
        return {"called": None, "call": {"name": None}}
    call = None if name is None else {"name": name, "arguments": calls[0].arguments}
    verdict = judge(calls, tools)
    wrong = {"call_error": verdict.message, "call_error_kind": verdict.error} if verdict.error else {}
    return {"called": name, "call": call, **wrong}


def _bfcl(task: ToolTask, prompt: Prompt, outcome: Outcome) -> BfclVerdict | None:
    """The leaderboard's verdict on what was generated; None for a task that is not of it.

    The prompt ends with the call's opener, so text follows it also where the model would not have opened a
    call: without a listed "no tool", an opener of probability below one half counts as no call.
    """
    facts = (task.metadata or {}).get("bfcl")
    if facts is None:
        return None
    calls = read_calls(_written(prompt, outcome.completion), tools=task.tools)
    opener = outcome.opener_log_prob if prompt.no_tool == "complement" else None
    unopened = opener is not None and opener < -math.log(2)
    if unopened or (
        calls and calls[0].name is not None and calls[0].name == prompt.template.get("no_tool_name")
    ):
        calls = []
    answered = next((tool for tool in task.tools if tool.name in task.targets), None)
    return bfcl_verdict(calls, facts, answered.parameters.get("required", []) if answered else [])


# -- agents ------------------------------------------------------------------------------------------------------

_FIRST = ("tool_probabilities", "chosen", "chosen_tool", "candidate_mass", "opener_log_prob")


def _agent(task: AgentTask, prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
    """`turns`, and at the top what a tool task has, of the first turn.

    `score` is 1 where all that the task asks for came true, else 0: `reached_answer` where it gives an answer,
    `called_target` where it gives a target (a right call of an acceptable tool in some turn; for null, no call
    in any). It is absent where the task gives neither.
    """
    turns = [_turn(prompt, number, turn) for number, turn in enumerate(outcome.turns, 1)]
    last = outcome.turns[-1]
    answer = None if last.called else last.text.strip()
    out: dict[str, Any] = {
        **_shown(task, prompt),
        **{name: turns[0][name] for name in _FIRST},
        **{
            name: turns[0][name]
            for name in ("called", "call", "call_error", "call_error_kind")
            if name in turns[0]
        },
        "turns": turns,
        "n_turns": len(turns),
        "ended_by": outcome.ended_by,
        "answer": answer,
    }
    wanted: dict[str, bool] = {}
    if task.answer is not None:
        out["expected_answer"] = task.answer
        wanted["reached_answer"] = answer is not None and says_answer(answer, task.answer)
    if task.has_target:
        out["target"] = task.raw.get("target")
        called = [turn["called"] for turn in turns if "call_error" not in turn]
        spoken = {turn["called"] for turn in turns} - {None}
        wanted["called_target"] = bool(set(called) & set(task.targets)) if task.targets else not spoken
    return out | wanted | ({"score": float(all(wanted.values()))} if wanted else {})


def _turn(prompt: Prompt, number: int, turn: Turn) -> dict[str, Any]:
    """One turn and its decision; `slot` is `reached` by the turn's own call, `attached` on the side, or
    `forced` where the call's opener was given to the model."""
    out: dict[str, Any] = {
        "turn": number,
        "start": turn.start,
        "end": turn.end,
        "text": turn.text,
        "position": turn.position,
        "slot": "attached" if not turn.reached else "forced" if turn.forced else "reached",
        **turn.found,
        **_decision(
            replace(prompt, candidates=turn.candidates), turn.candidate_token_log_probs, turn.opener_log_prob
        ),
        "opener_log_prob": turn.opener_log_prob,
    }
    if "result" in out:
        out["result"] = out["result"] | {"shown": turn.result is not None}
        if turn.left_out:
            out["result"]["tokens_left_out"] = turn.left_out
    return out


def says_answer(said: str, expected: str | float | int) -> bool:
    """Whether an agent's last turn says the expected answer: alone, after "answer is", or as a part of its prose.

    A number must stand there by itself ("17 days", not "2017"); text must occur as whole words.
    """
    if same_answer(said, expected):
        return True
    want = _number(str(expected))
    if want is not None:
        return any(_number(found.group()) == want for found in _ALONE.finditer(said))
    return f" {_bare(str(expected))} " in f" {_bare(said)} "


# -- prompting ---------------------------------------------------------------------------------------------------


def _prompting(task: PromptingTask, prompts: Sequence[Prompt], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    passages: dict[str, Any] = {}
    scores = []
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        passage = _passage(prompt, outcome)
        if prompt.candidates:
            probabilities = _softmax(outcome.candidate_log_probs)
            passage["choice_probabilities"] = [
                {"choice": c.name, "token_ids": list(c.token_ids), "log_prob": log_prob, "probability": p}
                for c, log_prob, p in zip(
                    prompt.candidates, outcome.candidate_log_probs, probabilities, strict=True
                )
            ]
            best = max(passage["choice_probabilities"], key=lambda entry: entry["log_prob"])
            passage["chosen"] = best["choice"]
            passage["candidate_mass"] = math.fsum(math.exp(value) for value in outcome.candidate_log_probs)
            if task.target is not None:
                passage["score"] = float(best["choice"] == task.target)
                scores.append(passage["score"])
        passages[prompt.passage] = passage
    out: dict[str, Any] = {"passages": passages}
    if task.target is not None:
        out["target"] = task.target
    if scores:
        out["score"] = sum(scores) / len(scores)
    return out


# -- chain of thought ----------------------------------------------------------------------------------------------


def _cot(task: CotTask, outcome: Outcome) -> dict[str, Any]:
    answer = outcome.found.get("answer")
    out: dict[str, Any] = {
        "steps": outcome.found.get("steps", []),
        "answer": answer,
        "answer_forced": outcome.answer_forced,
    }
    if task.answer is not None:
        out["target"] = task.answer
        out["score"] = float(answer is not None and same_answer(answer, task.answer))
    return out


def same_answer(said: str, expected: str | float | int) -> bool:
    """Numbers by value, text without case, articles and punctuation around words.

    The number that counts is the first one said, after the last equals sign where there is one ("14 * 12 = 168").
    """
    want = _number(str(expected))
    if want is not None:
        found = _NUMBER.search(said.rpartition("=")[2])
        return found is not None and _number(found.group()) == want
    return _bare(said) == _bare(str(expected))


def _number(text: str) -> float | None:
    bare = text.strip().rstrip(".").lstrip("$")
    return float(bare.replace(",", "")) if _NUMBER.fullmatch(bare) else None


def _bare(text: str) -> str:
    words = [bare for word in text.casefold().split() if (bare := word.strip(_OUTER_MARKS))]
    # An answer may be an article alone (option A) or a mark alone.
    return " ".join([word for word in words if word not in _ARTICLES] or words or text.split())
