"""P(tool|context), calls read back, answers compared, and what a record says."""

from __future__ import annotations

import json
import math
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probe.capture import ANSWER_TOKENS, Controller, Outcome, Reasoning
from probe.prompts import Candidate, Prompt, Span
from probe.tasks import CotTask, Message, PromptingTask, ToolTask, Variant, error_record, jobs, record
from probe.tasks.choice import tool_probabilities
from probe.tasks.tool_selection import read_call
from probe.tools.definitions import Tool

getcontext().prec = 60
TOOLS = tuple(Tool(name=name) for name in ("search", "calc", "mail"))
OPEN = tuple(Tool(name=tool.name, parameters={"additionalProperties": True}) for tool in TOOLS)


def prompt_for(no_tool: str = "listed", names=("search", "calc", "mail")) -> Prompt:
    shown = [*names, None] if no_tool == "listed" else list(names)
    return Prompt(
        passage="main",
        text="…",
        token_ids=[1, 5, 6],
        n_prompt=3,
        spans=[Span("bos", 0, 1), Span("other", 1, 3)],
        template={"name": "chat", "no_tool_name": "no_tool"} if no_tool == "listed" else {"name": "chat"},
        candidates=tuple(Candidate(name, (9, index)) for index, name in enumerate(shown)),
        no_tool=no_tool,
        call_prefix='{"name": "',
    )


def outcome_for(
    log_probs, opener: float | None = None, completion: str = 'calc", "arguments": {}}'
) -> Outcome:
    return Outcome(
        token_ids=[1, 5, 6, 7],
        n_prompt=3,
        n_new=1,
        finish_reason="stop",
        completion=completion,
        spans=[],
        span_texts=[],
        labels=[],
        layers=[0],
        tensors={},
        candidate_log_probs=list(log_probs),
        candidate_token_log_probs=[[log_prob] for log_prob in log_probs],
        opener_log_prob=opener,
    )


def tool_task(target="calc", **more) -> ToolTask:
    return ToolTask(
        id="t", messages=(Message("user", "?"),), tools=TOOLS, target=target, raw={"target": target}, **more
    )


# -- P(tool|context) ---------------------------------------------------------------------------------------------


def test_listed_no_tool_is_one_more_candidate_and_order_is_as_shown():
    log_probs = [-3.0, -1.0, -2.0, -2.5]
    entries = tool_probabilities(prompt_for(), [[value] for value in log_probs], None)
    assert [entry["tool"] for entry in entries] == ["search", "calc", "mail", None]
    assert [entry["log_prob"] for entry in entries] == log_probs
    expected = torch.tensor(log_probs, dtype=torch.float64).softmax(0).tolist()
    assert [entry["probability"] for entry in entries] == pytest.approx(expected, abs=1e-15)
    among_tools = torch.tensor(log_probs[:-1], dtype=torch.float64).softmax(0).tolist()
    assert [entry["choice_probability"] for entry in entries[:-1]] == pytest.approx(among_tools, abs=1e-15)
    assert "choice_probability" not in entries[-1]
    assert entries[1]["token_ids"] == [9, 1]


@pytest.mark.parametrize(
    "opener", [-1e-15, -1e-9, -1e-4, -0.3, -math.log(2), -0.7, -3.0, -37.0, -100.0, -740.0]
)
def test_no_tool_by_complement_is_log_of_one_minus_the_openers_probability(opener):
    """Against 60-digit decimal arithmetic, near probability 1 and near 0."""
    entries = tool_probabilities(prompt_for("complement"), [[-0.5], [-1.0, -0.5], [-4.0]], opener)
    exact = float((1 - Decimal(opener).exp()).ln())
    assert entries[-1]["tool"] is None
    assert entries[-1]["log_prob"] == pytest.approx(exact, rel=1e-13, abs=1e-300)
    assert entries[-1]["token_ids"] == []
    assert [entry["log_prob"] for entry in entries[:-1]] == [-0.5 + opener, -1.5 + opener, -4.0 + opener]
    total = math.fsum(entry["probability"] for entry in entries)
    assert total == pytest.approx(1, abs=1e-12)
    # What all tools have in common leaves the choice among them alone.
    alone = torch.tensor([-0.5, -1.5, -4.0], dtype=torch.float64).softmax(0).tolist()
    assert [entry["choice_probability"] for entry in entries[:-1]] == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("opener", [0.0, 1e-7, -1e-320])
def test_an_opener_that_is_certain_leaves_a_finite_log_probability(opener):
    entries = tool_probabilities(prompt_for("complement"), [[-0.5], [-1.0, -0.5], [-4.0]], opener)
    assert all(math.isfinite(entry["log_prob"]) and math.isfinite(entry["probability"]) for entry in entries)
    assert entries[-1]["probability"] < 1e-250


@given(
    log_probs=st.lists(st.floats(-500, 0), min_size=4, max_size=4),
    opener=st.one_of(st.none(), st.floats(-700, 0)),
)
def test_probabilities_are_finite_and_sum_to_one(log_probs, opener):
    prompt = prompt_for("listed" if opener is None else "complement")
    log_probs = log_probs[: len(prompt.candidates)]
    entries = tool_probabilities(prompt, [[value] for value in log_probs], opener)
    assert math.fsum(entry["probability"] for entry in entries) == pytest.approx(1, abs=1e-12)
    assert math.fsum(entry.get("choice_probability", 0) for entry in entries) == pytest.approx(1, abs=1e-12)
    json.dumps(entries, allow_nan=False)


def test_chosen_may_be_no_tool_while_chosen_tool_is_the_best_tool():
    out = record(tool_task(None), [prompt_for()], [outcome_for([-3.0, -2.0, -5.0, -1.0])], 0.1)
    assert (out["chosen"], out["chosen_tool"]) == (None, "calc")
    assert out["score"] == 1.0
    assert out["target"] is None
    assert out["candidate_mass"] == pytest.approx(sum(map(math.exp, (-3.0, -2.0, -5.0, -1.0))))


@pytest.mark.parametrize(
    ("target", "log_probs", "score"),
    [
        ("calc", [-3.0, -1.0, -2.0, -4.0], 1.0),
        ("mail", [-3.0, -1.0, -2.0, -4.0], 0.0),
        (("mail", "calc"), [-3.0, -1.0, -2.0, -4.0], 1.0),
        ("calc", [-3.0, -1.0, -2.0, -0.5], 0.0),
        (None, [-3.0, -1.0, -2.0, -0.5], 1.0),
        (None, [-3.0, -1.0, -2.0, -4.0], 0.0),
    ],
)
def test_the_score_is_whether_the_choice_is_acceptable(target, log_probs, score):
    out = record(tool_task(target), [prompt_for()], [outcome_for(log_probs)], 0.1)
    assert out["score"] == score


def test_a_record_has_every_field_of_the_contract():
    out = record(
        tool_task(metadata={"split": "dev"}), [prompt_for()], [outcome_for([-1.0, -2.0, -3.0, -4.0])], 0.1
    )
    fields = {
        *("id", "kind", "status", "seconds", "score", "target", "prompt", "token_ids", "n_prompt", "n_new"),
        *("completion", "finish_reason", "spans", "tool_probabilities", "chosen", "chosen_tool", "called"),
        *("candidate_mass", "call_prefix", "metadata"),
    }
    assert fields <= out.keys()
    assert out["status"] == "ok"
    json.dumps(out, allow_nan=False)


def test_a_shortened_prompt_makes_the_status_truncated():
    prompt = prompt_for()
    prompt.truncation = {"rule": "r", "tokens_dropped": 3, "n_ctx": 8}
    out = record(tool_task(), [prompt], [outcome_for([-1.0, -2.0, -3.0, -4.0])], 0.1)
    assert out["status"] == "truncated"
    assert out["truncation"] == prompt.truncation


def test_an_error_record_keeps_a_target_that_is_null():
    out = error_record(tool_task(None), "error", "boom", 1.0)
    assert out["target"] is None
    assert (out["status"], out["error"]) == ("error", "boom")
    assert "score" not in out


# -- calls read back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "called", "arguments", "error"),
    [
        ('calc", "arguments": {"x": [1, 2.5]}}]</tool_call>', "calc", {"x": [1, 2.5]}, None),
        ('calc", "arguments": {}}', "calc", {}, None),
        ('calc", "parameters": {"x": 1}}', "calc", {"x": 1}, None),
        ('calc"}', "calc", None, None),
        ('calc", "arguments": {"x": "un', "calc", None, "not complete"),
        ('calc", "arguments": {"x": }}', "calc", None, "not complete"),
        ('calc", "arguments": {"x": NaN}}', "calc", None, "not complete"),
        ('calc", "arguments": {"x": -Infinity}}', "calc", None, "not complete"),
        ('calc", "arguments": {"x": 1e999}}', "calc", None, "not complete"),
        ('calc", "arguments": {"x": ' + "9" * 5000 + "}}", "calc", None, "not complete"),
        ('calc", "arguments": ' + "[" * 100_000, "calc", None, "not complete"),
        ('no_tool", "arguments": {}}', None, None, None),
        ("no_tool", None, None, "not closed"),
        ('calculator", "arguments": {}}', "calculator", {}, "not a shown tool"),
        ('", "arguments": {}}', "", {}, "not a shown tool"),
        ("I would rather not.", None, None, "not closed"),
        ("", None, None, "not closed"),
        ('calc\n", "arguments": {}}', None, None, "not closed"),
        ("\x00\ud800\ufffd", None, None, "not closed"),
    ],
)
def test_a_generated_call_is_read(completion, called, arguments, error):
    reading = read_call(prompt_for(), completion, OPEN)
    assert reading["called"] == called
    assert (reading["call"] or {}).get("arguments") == arguments
    assert (error is None) == ("call_error" not in reading)
    assert error is None or error in reading["call_error"]
    json.dumps(reading, allow_nan=False)


@pytest.mark.parametrize(
    ("prefix", "completion"),
    [
        ('<tool_call>[{"name": "', 'calc", "arguments": {"x": 1}}'),
        ('<tool_call>\n{"name": "', 'calc", "arguments": {"x": 1}}'),
        ('[TOOL_CALLS] [{"name": "', 'calc", "arguments": {"x": 1}}'),
        ('{"name": "', 'calc", "parameters": {"x": 1}}'),
        ("<tool_call>\n<function=", "calc>\n<parameter=x>\n1\n</parameter>\n</function>"),
        ("[TOOL_CALLS]", 'calc[ARGS]{"x": 1}'),
        ("<|python_start|>[", "calc(x=1)"),
        ("[", "calc(x=1)"),
        ("```tool_code\n", "calc(x=1)"),
    ],
)
def test_a_call_is_read_and_ends_in_whatever_way_the_template_writes_it(prefix, completion):
    prompt = prompt_for()
    prompt.call_prefix = prefix
    reading = read_call(prompt, completion, OPEN)
    assert reading == {"called": "calc", "call": {"name": "calc", "arguments": {"x": 1}}}
    (job,) = jobs(tool_task(), [prompt])
    assert job.controller.finished is not None
    assert [end for end in range(len(completion) + 1) if job.controller.finished(completion[:end])] == [
        len(completion)
    ]


@pytest.mark.parametrize(
    ("completion", "kind"),
    [
        ('calc", "arguments": {"x": 1}}', None),
        ('calc", "arguments": {"x": ', "not_json"),
        ('calc"}', "missing_argument"),
        ('calc", "arguments": {"x": 1, "y": 2}}', "unexpected_argument"),
        ('calc", "arguments": {"x": "1"}}', "mistyped_argument"),
        ('calc", "arguments": {"x": -1}}', "invalid_argument"),
        ('clac", "arguments": {"x": 1}}', "unknown_tool"),
        ('calc", "arguments": {"x": 1}}, {"name": "calc", "arguments": {"x": 2}}]', "several_calls"),
        ('no_tool", "arguments": {}}', None),
    ],
)
def test_a_wrong_call_has_a_kind(completion, kind):
    whole = {"type": "integer", "minimum": 0}
    calc = Tool(name="calc", parameters={"properties": {"x": whole}, "required": ["x"]})
    prompt = prompt_for()
    prompt.call_prefix = '<tool_call>[{"name": "'
    reading = read_call(prompt, completion, [calc])
    assert reading.get("call_error_kind") == kind
    assert ("call_error" in reading) == (kind is not None)


@given(st.text())
def test_reading_and_saving_whatever_was_generated_does_not_raise(completion):
    for no_tool in ("listed", "complement"):
        reading = read_call(prompt_for(no_tool), completion, OPEN)
        json.dumps(reading, allow_nan=False)


@pytest.mark.parametrize(
    ("completion", "over"),
    [
        ('calc", "arguments": {"x": 1}}', True),
        ('calc", "arguments": {"x": 1}}]', True),
        ('calc", "arguments": {"x": 1}', False),
        ('calc", "arguments": {"x": "}"', False),
        ("calc\n", True),
        ("calc", False),
        ("", False),
    ],
)
def test_generation_stops_when_the_call_is_complete(completion, over):
    (job,) = jobs(tool_task(), [prompt_for()])
    assert job.controller.finished is not None
    assert job.controller.finished(completion) is over


def test_a_cot_job_asks_for_an_answer_and_forces_the_cue_only_after_free_reasoning():
    prompt = prompt_for()
    (free,) = jobs(CotTask(id="c", question="?"), [prompt])
    assert isinstance(free.controller, Reasoning)
    assert (free.controller.answer_cue, free.controller.answer_tokens) == ("Answer:", ANSWER_TOKENS)
    prompt.forced_steps = 2
    (forced,) = jobs(CotTask(id="c", question="?"), [prompt])
    assert forced.controller.answer_cue is None
    (plain,) = jobs(PromptingTask(id="p", input="x", variants=(Variant(name="base"),)), [prompt])
    assert plain.controller.finished is None
    assert type(plain.controller) is Controller


# -- records of answers --------------------------------------------------------------------------------------------------


def test_a_cot_record_has_a_score_only_where_there_is_an_answer():
    prompt, outcome = prompt_for(), outcome_for([])
    outcome.parsed = {"steps": ["One."], "answer": "4."}
    scored = record(CotTask(id="c", question="?", answer=4), [prompt], [outcome], 0.0)
    assert (scored["score"], scored["target"], scored["steps"]) == (1.0, 4, ["One."])
    free = record(CotTask(id="c", question="?"), [prompt], [outcome], 0.0)
    assert "score" not in free
    assert "target" not in free
    outcome.parsed = {"steps": [], "answer": None}
    assert record(CotTask(id="c", question="?", answer=4), [prompt], [outcome], 0.0)["score"] == 0.0


def test_a_prompting_record_scores_each_variant_and_their_mean():
    prompts, outcomes = [], []
    for name, log_probs in (("base", [-1.0, -2.0]), ("v", [-3.0, -2.0])):
        prompt = prompt_for()
        prompt.passage, prompt.no_tool, prompt.call_prefix = name, None, None
        prompt.candidates = (Candidate(" cold", (5,)), Candidate(" warm", (6, 7)))
        prompts.append(prompt)
        outcomes.append(outcome_for(log_probs))
    task = PromptingTask(
        id="p",
        input="hot",
        variants=(Variant(name="base"), Variant(name="v")),
        choices=(" cold", " warm"),
        target=" cold",
    )
    out = record(task, prompts, outcomes, 0.0)
    assert [out["passages"][name]["chosen"] for name in ("base", "v")] == [" cold", " warm"]
    assert out["score"] == 0.5
    base = out["passages"]["base"]
    assert base["candidate_mass"] == pytest.approx(math.exp(-1) + math.exp(-2))
    assert [e["probability"] for e in base["choice_probabilities"]] == pytest.approx(
        torch.tensor([-1.0, -2.0]).softmax(0).tolist()
    )
    assert [e["token_ids"] for e in base["choice_probabilities"]] == [[5], [6, 7]]
