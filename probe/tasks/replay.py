"""The kind `replay`: a transcript of a log, teacher-forced in one prefill, with every decision scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from probe.jsontext import Check, Spot, check_list, kind_of
from probe.maths.agreement import replay_agreement
from probe.prompts import Codec, Prompt, PromptFault, results_of, transcript_prompt
from probe.tasks.agent import AGENT_INSTRUCTION, Episode, turns_record
from probe.tasks.choice import ToolTalk, choice_fields, choice_text
from probe.tasks.kind import Kind, Setting, Shelf
from probe.tools.calls import Call, Verdict
from probe.tools.execution import ToolResult

if TYPE_CHECKING:
    from probe.capture import Job, Outcome, Reply
    from probe.tools.execution import Executable


class ReplayTask(ToolTalk, frozen=True, kw_only=True, tag="replay"):
    """A transcript of a log."""

    token_ids: tuple[int, ...] = ()
    """Its tokens as they were, from the first one of the prompt on; empty: the messages are rendered."""
    emitted: tuple[tuple[int, int], ...] = ()
    """Of `token_ids` the ranges that the model emitted, the tokens that end a turn included; empty: they are searched for."""
    logprobs: tuple[float | None, ...] = ()
    """Log-probability of each emitted token in the log, nats; None: not known."""


# -- fields ------------------------------------------------------------------------------------------------


def _check_token(value: Any, spot: Spot) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        spot.fault("must be a token id, a whole number from 0 on", "write the ids that the log has")
    return value


def _check_log_prob(value: Any, spot: Spot) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        spot.fault(f"must be a number or null, is {kind_of(value)}", "write log-probabilities in nats")
    elif value is not None and value > 0:
        spot.fault(f"is {value}: no log-probability is above 0", "write log-probabilities in nats")
    return value


def _check_range(value: Any, spot: Spot) -> tuple[int, int]:
    ends = check_list(value, spot, _check_token)
    if len(ends) != 2 or any(not isinstance(end, int) for end in ends) or not 0 < ends[0] < ends[1]:
        spot.fault("is no range of positions", "write [start, end], the end behind the last token")
        return 1, 2
    return ends[0], ends[1]


def _fields(shelf: Shelf) -> dict[str, Check]:
    shown = choice_fields(shelf)
    return {
        "messages": shown["messages"],
        "tools": shown["tools"],
        "token_ids": lambda value, spot: check_list(value, spot, _check_token),
        "emitted": lambda value, spot: check_list(value, spot, _check_range),
        "logprobs": lambda value, spot: check_list(value, spot, _check_log_prob),
    }


def _compare(fields: dict[str, Any], spot: Spot) -> None:
    """Ranges lie in the tokens, one behind the other; each emitted token has its log-probability."""
    ids, ranges = fields.get("token_ids", ()), fields.get("emitted", ())
    if ranges and not ids:
        spot["emitted"].fault('given without "token_ids"', 'add "token_ids", or leave it out', at_key=True)
    at = 1
    for index, (start, end) in enumerate(ranges):
        if ids and (start < at or end > len(ids)):
            fix = f"write ranges in order, within the {len(ids)} token ids"
            spot["emitted"][index].fault(f"[{start}, {end}] does not follow on what is before it", fix)
        at = end
    n_emitted = sum(end - start for start, end in ranges)
    if ranges and "logprobs" in fields and len(fields["logprobs"]) != n_emitted:
        what = f"has {len(fields['logprobs'])} entries for {n_emitted} emitted tokens"
        spot["logprobs"].fault(what, "write one for each emitted token, null where it is not known")
    if "messages" in fields and not any(message.role == "assistant" for message in fields["messages"]):
        fix = "add what the assistant said, or make it a tool_selection task"
        spot["messages"].fault("have no turn of the assistant: there is nothing to replay", fix)


# -- prompts -----------------------------------------------------------------------------------------------


def _ranges(task: ReplayTask) -> Sequence[tuple[int, int]]:
    """What was emitted where the task says so; as many tokens at the end as there are log-probabilities for a single turn."""
    if task.emitted or not (task.token_ids and task.logprobs):
        return task.emitted
    n = len(task.logprobs)
    single = sum(message.role == "assistant" for message in task.messages) == 1
    return [(len(task.token_ids) - n, len(task.token_ids))] if single and n < len(task.token_ids) else ()


def _render(task: ReplayTask, codec: Codec, _setting: Setting) -> list[Prompt]:
    unknown = [token for token in task.token_ids if token >= len(codec.tokenizer)]
    if unknown:
        what = f"token {unknown[0]} is not one of the {len(codec.tokenizer)} of the model"
        raise PromptFault(f"{what}: replay the log with the model that wrote it, or leave token_ids out")
    prompt = transcript_prompt(
        [message.turn() for message in task.messages],
        task.tools,
        codec,
        instruction=AGENT_INSTRUCTION,
        token_ids=task.token_ids,
        emitted=_ranges(task),
    )
    given = prompt.given.turns if prompt.given else ()
    n_emitted = sum(turn.end + turn.ended - turn.start for turn in given)
    if task.token_ids and task.logprobs and len(task.logprobs) != n_emitted:
        what = f"logprobs has {len(task.logprobs)} entries, and {n_emitted} tokens were emitted"
        raise PromptFault(
            f'{what} by what was read of the turns: give "emitted", the ranges that they are of'
        )
    return [prompt]


class _Log(Episode):
    """The other side of a transcript as it was: what came back is what the log says."""

    several = True

    def __init__(self, task: ReplayTask, prompt: Prompt, tools: Mapping[str, Executable] | None = None):
        super().__init__(task, prompt, tools or {})
        n_turns = len(prompt.given.turns) if prompt.given else 0
        self._results = results_of([message.turn() for message in task.messages], n_turns)
        self._number = -1

    def reply(self, text: str) -> Reply:
        self._number += 1
        reply = super().reply(text)
        if not self._results[self._number]:
            reply.fields.pop("result", None)
        return reply

    def _result(self, first: Call, verdict: Verdict | None) -> ToolResult:
        return ToolResult(tool=first.name or "", content="\n".join(self._results[self._number]))


def _jobs(task: ReplayTask, prompts: Sequence[Prompt], _setting: Setting) -> list[Job]:
    from probe.capture import Job
    from probe.capture.replay import Replay

    return [
        Job(prompt, task.id, Replay(partial(_Log, task, prompt), prompt.given))
        for prompt in prompts
        if prompt.given is not None
    ]


# -- records -----------------------------------------------------------------------------------------------


def _score(task: ReplayTask, prompts: Sequence[Prompt], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """`turns` as an agent has them, and how far the model agrees with the log."""
    (prompt,), (outcome,) = prompts, outcomes
    agreement = replay_agreement(outcome.parsed["emitted"], task.logprobs)
    return turns_record(task, prompt, outcome) | {"replay_agreement": agreement}


def _lint(tasks: Sequence[ReplayTask]) -> Iterator[tuple[ReplayTask | None, str]]:
    for task in tasks:
        if task.logprobs and not task.token_ids:
            yield (
                task,
                "has log-probabilities and no token ids: they count only where the rendered text has as many tokens",
            )


def replay_of(task: ToolTalk, record: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a task file that replays an agent's transcript of a run: its task and its record.

    Tokens, ranges and messages are the record's.
    """
    raw = {name: value for name, value in task.raw.items() if name in ("messages", "input", "tools")}
    asked = raw.get("messages") or [
        {"role": message.role, "content": message.content} if message.fields is None else message.fields
        for message in task.messages
    ]
    messages, emitted = list(asked), []
    for turn in record["turns"]:
        emitted.append([turn["start"], max(turn["end"], turn["start"] + 1)])
        messages.append({"role": "assistant", "content": turn["text"]})
        if turn.get("result", {}).get("shown"):
            messages.append({"role": "tool", "content": turn["result"]["content"]})
    emitted[-1][1] = len(record["token_ids"])
    return {
        "id": record["id"],
        "kind": "replay",
        "messages": messages,
        "tools": raw.get("tools") or [tool.document() for tool in task.tools],
        "token_ids": list(record["token_ids"]),
        "emitted": emitted,
    }


REPLAY = Kind(
    task=ReplayTask,
    fields=_fields,
    required=("messages", "tools"),
    compare=_compare,
    render=_render,
    jobs=_jobs,
    score=_score,
    max_new_tokens=1,  # none is chosen
    memory=True,
    text=lambda task: (*choice_text(task), *map(str, task.token_ids)),
    lint=_lint,
)
