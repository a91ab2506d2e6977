"""Masks and ablated heads in the engine against one slow eager forward a candidate."""

from __future__ import annotations

import pytest
import torch

from probe.capture import CaptureSpec, Generation, Job, Outcome, plan_shared, run_batch
from probe.capture.batch import Capturer
from probe.model.edits import HeadAblation, Knockout
from tests.slow import intervened, slow_reads, slow_scores
from tests.test_capture import make_jobs


def jobs_with(model, *edits_of_each):
    """One job a set of edits, all on the same prompt."""
    return [
        Job(make_jobs(model, 1)[0].prompt, f"task {number}", edits=tuple(edits))
        for number, edits in enumerate(edits_of_each)
    ]


def scores(model, jobs) -> list[list[float]]:
    capturer = Capturer(model, model.codec, CaptureSpec(frozenset()), Generation(1))
    by_name: dict[int, Outcome] = {}
    order = plan_shared(jobs)
    capturer.run([jobs[index] for index in order], lambda n, outcome: by_name.__setitem__(order[n], outcome))
    return [by_name[index].candidate_log_probs for index in range(len(jobs))]


def test_masks_and_ablations_equal_a_slow_forward_each(tiny_model):
    facts = tiny_model.facts
    prompt = make_jobs(tiny_model, 1)[0].prompt
    span = next(span for span in prompt.spans if span.label == "tool:a")
    slot, last = prompt.n_prompt - 1, facts.n_layers - 1
    reads = slow_reads(tiny_model.hf, prompt.token_ids, slot)
    heads = {0: (0, facts.n_heads - 1), last: (1,)}
    zeroed = [(layer, head) for layer, part in heads.items() for head in part]
    other = {
        layer: torch.stack([reads[layer, (head + 1) % facts.n_heads] for head in part])
        for layer, part in heads.items()
    }
    cases = [
        ((), {}),
        (
            (Knockout(span.start, span.end, span.end),),
            {"masked": [range(span.start, span.end)], "rows_from": span.end},
        ),
        (
            (Knockout(span.start, span.end, slot),),
            {"masked": [range(span.start, span.end)], "rows_from": slot},
        ),
        (
            (Knockout(3, 9, 12, frozenset({last})),),
            {"masked": [range(3, 9)], "rows_from": 12, "layers": {last}},
        ),
        ((HeadAblation(heads, slot),), {"zero_heads": zeroed, "rows_from": slot}),
        ((HeadAblation(heads, 5),), {"zero_heads": zeroed, "rows_from": 5}),
        (
            (HeadAblation(heads, slot, other),),
            {
                "reads": {
                    (layer, head): other[layer][i]
                    for layer, part in heads.items()
                    for i, head in enumerate(part)
                },
                "rows_from": slot,
            },
        ),
        (
            (Knockout(2, 6, slot), Knockout(9, 14, slot), HeadAblation({0: (0,)}, slot)),
            {"masked": [range(2, 6), range(9, 14)], "rows_from": slot, "zero_heads": [(0, 0)]},
        ),
    ]
    jobs = jobs_with(tiny_model, *(edits for edits, _ in cases))
    log_probs = scores(tiny_model, jobs)
    assert max(job.shared for job in jobs) > 0
    candidates = [candidate.token_ids for candidate in prompt.candidates]
    plain = slow_scores(tiny_model.hf, prompt.token_ids, candidates)
    changes = []
    for (edits, asked), part in zip(cases, log_probs, strict=True):
        expected = slow_scores(tiny_model.hf, prompt.token_ids, candidates, **asked)
        assert part == pytest.approx(expected, abs=1e-4), edits
        changes.append(max(abs(a - b) for a, b in zip(expected, plain, strict=True)))
    # A window may hide the span already; everything else moves the scores.
    assert sum(change > 1e-3 for change in changes) >= len(cases) - 3


def test_an_edit_holds_while_tokens_are_generated(tiny_model):
    prompt = make_jobs(tiny_model, 6)[0].prompt
    edits = (Knockout(4, 15, 20), HeadAblation({1: (0,)}, 25))
    plain = Job(make_jobs(tiny_model, 6)[0].prompt, "plain")
    jobs = [Job(prompt, "edited", edits=edits), plain]
    spec = CaptureSpec(frozenset({"log_probs", "z"}))
    edited, untouched = run_batch(tiny_model, tiny_model.codec, jobs, spec, Generation(6))
    for outcome, masked, zeroed in ((edited, [range(4, 15)], [(1, 0)]), (untouched, [], [])):
        log_probs = []
        ids = outcome.token_ids
        with (
            intervened(tiny_model.hf, masked, rows_from=20),
            intervened(tiny_model.hf, zero_heads=zeroed, rows_from=25),
            torch.no_grad(),
        ):
            logits = tiny_model.hf(torch.tensor([ids[:-1]]), use_cache=False).logits[0].double()
        rows = logits.log_softmax(-1)[outcome.n_prompt - 1 :]
        log_probs = [float(rows[step, token]) for step, token in enumerate(ids[outcome.n_prompt :])]
        assert outcome.tensors["log_probs"].tolist() == pytest.approx(log_probs, abs=1e-4)
    assert float(edited.tensors["z"][1, 0].abs().max()) == 0
    assert float(untouched.tensors["z"][1, 0].abs().max()) > 0


def test_nested_prefixes_run_every_shared_token_once(tiny_model):
    prompt = make_jobs(tiny_model, 1)[0].prompt
    slot = prompt.n_prompt - 1
    ends = (33, 33, slot, slot, slot, slot)
    jobs = jobs_with(tiny_model, *((Knockout(2, 5, row),) for row in ends))
    order = plan_shared(jobs)
    assert [job.shared for job in jobs] == [33, 33, *[slot - 1] * 4]
    capturer = Capturer(tiny_model, tiny_model.codec, CaptureSpec(frozenset()), Generation(1))
    capturer.run([jobs[index] for index in order], lambda *_: None)
    assert capturer.prefixes.tokens_run == slot - 1


def test_a_knockout_that_leaves_no_key_or_hides_the_sink_is_refused():
    for start, end, rows_from in ((0, 3, 5), (4, 4, 9), (4, 9, 7)):
        with pytest.raises(ValueError, match="knock-out"):
            Knockout(start, end, rows_from)
