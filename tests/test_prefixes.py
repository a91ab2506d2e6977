"""Which prefixes are shared, against every way of grouping; and that each is run once for a whole file."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import probe
from probe.capture import SITES, Capturer, CaptureSpec, Generation, plan_shared, run_batch
from probe.capture.prefill import PASS_TOKENS, Part, prefill
from probe.capture.prefixes import LEAST
from probe.harness.plan import Options, plan, read_inputs
from probe.harness.schedule import schedule
from probe.harness.sizes import Shape
from probe.model.attention import KVCache, Recorder
from probe.prompts import Segment, prompt_of
from tests.conftest import tiny
from tests.test_capture import PARITY, eager, relative


def job(ids: list[int]) -> SimpleNamespace:
    prompt, most = SimpleNamespace(token_ids=ids, spans=[]), len(ids) - 2
    return SimpleNamespace(prompt=prompt, shareable=most, first_read=most, shared=-1, prefix_ends=())


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def saved(groups: list[list[list[int]]]) -> int:
    """Tokens not run again when each group shares the most it has in common."""
    total = 0
    for group in groups:
        shared = min((common(group[0], other) for other in group[1:]), default=0)
        shared = min([shared, *(len(ids) - 2 for ids in group)])
        total += shared * (len(group) - 1) if shared >= LEAST else 0
    return total


def partitions(items: list):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for mates in combinations(range(len(rest)), size):
            left = [item for i, item in enumerate(rest) if i not in mates]
            for groups in partitions(left):
                yield [[first, *(rest[i] for i in mates)], *groups]


# Prompts are paths of blocks of 16 tokens.
blocks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=6)


@settings(deadline=None, max_examples=400)
@given(blocks)
@example([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
def test_the_plan_saves_at_least_as_much_as_the_best_of_all_groupings(paths):
    prompts = [
        [token for block in path for token in [block] * 16] + [100 + number, 0, 0]
        for number, path in enumerate(paths)
    ]
    jobs = [job(ids) for ids in prompts]
    plan_shared(jobs)
    kept = {tuple(planned.prompt.token_ids[:end]) for planned in jobs for end in planned.prefix_ends}
    assert all(planned.shared == (planned.prefix_ends or (0,))[-1] for planned in jobs)
    below = {
        key: max((len(k) for k in kept if len(k) < len(key) and key[: len(k)] == k), default=0)
        for key in kept
    }
    assert all(planned.shared <= planned.shareable for planned in jobs)
    run = sum(len(key) - below[key] for key in kept)
    saving = sum(planned.shared for planned in jobs) - run
    assert saving >= max(saved(way) for way in partitions(prompts))
    for key in kept:
        inside = [
            planned
            for planned in jobs
            if tuple(planned.prompt.token_ids[: len(key)]) == key and planned.shared >= len(key)
        ]
        assert (len(key) - below[key]) * (len(inside) - 1) >= LEAST, "a prefix must be worth keeping"


def test_a_file_over_one_catalogue_runs_the_catalogue_once(tmp_path):
    tools = [
        {"name": f"tool_{n}", "description": f"Does thing number {n}.", "parameters": {"type": "object"}}
        for n in range(12)
    ]
    path = tmp_path / "tasks.jsonl"
    tasks = [
        {
            "id": f"t{n}",
            "kind": "tool_selection",
            "input": f"Please do thing {n}. " * (1 + n % 3),
            "tools": tools,
        }
        for n in range(30)
    ]
    path.write_text("\n".join(json.dumps(task | {"target": "tool_1"}) for task in tasks))
    model = probe.load("random:tiny-llama")
    queries: list[int] = []
    handle = model.blocks[0].register_forward_hook(
        lambda _m, args, _o: queries.append(args[0].shape[0] * args[0].shape[1])
    )
    try:
        run = probe.run(path, model=model, out=tmp_path / "run", max_new_tokens=1, analyze=False)
    finally:
        handle.remove()
    shared = min(
        common(run["t0"].record["token_ids"], run[f"t{n}"].record["token_ids"]) for n in range(1, 30)
    )
    total = sum(run[f"t{n}"].record["n_prompt"] for n in range(30))
    assert shared > 400
    candidates = 30 * 13 * 12  # at most: twelve names and no-tool, a dozen bytes each
    assert sum(queries) < total - 29 * (shared - 16) + candidates
    alone = probe.run(
        path, model=model, out=tmp_path / "alone", max_new_tokens=1, task_ids=("t7",), analyze=False
    )
    for name in ("resid_post", "resid_span_mean", "attn_to_spans", "value_to_spans", "logits"):
        assert relative(run["t7"][name], alone["t7"][name]) < PARITY, name


def test_tasks_with_different_prefixes_share_a_batch():
    model = tiny("tiny-gemma")
    heads = [
        "A first instruction, long enough to be shared by some. ",
        "Another text that others share, longer still. " * 2,
    ]
    jobs = []
    for number, head in enumerate([heads[0], heads[1], heads[0], heads[1], ""]):
        segments = [Segment(head, "system")] if head else []
        prompt = prompt_of([*segments, Segment(f"Question {number}?", "user")], model.codec, 4)
        jobs.append(probe.capture.Job(prompt, str(number)))
    spec = CaptureSpec(frozenset(SITES))
    together = run_batch(model, model.codec, jobs, spec, Generation(4))
    assert len({job.shared for job in jobs}) == 3
    for job, outcome in zip(jobs, together, strict=True):
        alone = run_batch(model, model.codec, [job], spec, Generation(4))[0]
        assert alone.token_ids == outcome.token_ids
        for name, tensor in alone.tensors.items():
            if tensor.is_floating_point():
                assert relative(outcome.tensors[name], tensor) < PARITY, name


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral", "tiny-gemma2", "tiny-gptoss"])
def test_a_prompt_longer_than_a_pass_equals_one_forward(name):
    model = tiny(name)
    outcome = model.capture("many words " * (PASS_TOKENS // 5), max_new_tokens=3)
    assert outcome.n_prompt > 2 * PASS_TOKENS
    out = eager(model, outcome.token_ids[:-1])
    rows = outcome.tensors["rows"]
    for layer in range(model.facts.n_layers - 1):
        assert relative(outcome.tensors["resid_post"][layer], out.hidden_states[layer + 1][0, rows]) < PARITY
        column = outcome.labels.index("user") if "user" in outcome.labels else 1
        positions = [
            p for s in outcome.spans if s.label == outcome.labels[column] for p in range(s.start, s.end)
        ]
        expected = out.hidden_states[layer + 1][0, positions].mean(0)
        assert relative(outcome.tensors["resid_span_mean"][layer, column], expected) < PARITY
        attended = out.attentions[layer][0][:, rows][:, :, positions].sum(-1)
        assert float((outcome.tensors["attn_to_spans"][layer, :, :, column] - attended).abs().max()) < 1e-5


def test_passes_are_bounded_and_cover_every_position_once():
    model = tiny("tiny-llama")
    lengths: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape[1]))
    recorder = Recorder(resid=True, layers=frozenset({0}))
    sizes = [900, 50, 300, 2500, 10]
    parts = [
        Part(row, [5 + i % 60 for i in range(size)], 0, 0, size - 1, [], ()) for row, size in enumerate(sizes)
    ]
    try:
        with model.recording(recorder):
            ran = prefill(model, recorder, KVCache(5, 2500), parts)
    finally:
        handle.remove()
    assert max(lengths) <= PASS_TOKENS
    assert sum(lengths) == sum(sizes)
    assert [sum(len(part) for part in result.states["resid"][0]) for result in ran] == sizes
    assert [sum(len(part) for part in result.hidden) for result in ran] == [1] * 5


def test_a_result_is_handed_over_before_the_batch_ends():
    model = tiny("tiny-llama")
    jobs = []
    for number in range(3):
        prompt = prompt_of(f"Prompt {number}. ", model.codec, 30)
        stop_after = (3, 9, 27)[number]
        jobs.append(
            probe.capture.Job(
                prompt, str(number), probe.capture.Controller(lambda text, n=stop_after: len(text) >= n)
            )
        )
    steps: list[int] = []
    seen: dict[int, int] = {}
    handle = model.blocks[0].register_forward_hook(lambda *_: steps.append(1))
    try:
        Capturer(model, model.codec, CaptureSpec(frozenset(SITES)), Generation(30)).run(
            jobs, lambda index, _outcome: seen.__setitem__(index, len(steps))
        )
    finally:
        handle.remove()
    assert list(seen) == [0, 1, 2]
    assert seen[0] < seen[1] < seen[2] == len(steps)


def test_a_batch_is_cut_by_memory_where_no_size_is_given(monkeypatch):
    path = Path(__file__).parent.parent / "tasks" / "tools.jsonl"
    model = tiny("tiny-llama")
    shape = Shape(30, 9, 3, 576, 64, 64, 1536, 49152, 8192)
    tasks = read_inputs(path, Options()).tasks
    plans = plan(tasks, model.tokenizer, shape, Options())

    def sizes(free: float, n_tasks: int = len(plans), **given) -> list[int]:
        monkeypatch.setattr("probe.harness.schedule._free_bytes", lambda cuda: free)
        groups = schedule(plans[:n_tasks], shape, Options(**given))
        return [len(batch) for group in groups for batch in group.batches]

    roomy, tight, none = sizes(1e12), sizes(1.5e9), sizes(0)
    assert max(roomy) == 8
    assert roomy[:2] == [1, 7], "the first record comes as soon as one task is done"
    assert sizes(1e12, batch_size=8)[0] == sizes(1e12, n_tasks=24)[0] == 8
    assert sum(roomy) == sum(tight) == sum(none) == len(tasks)
    assert 1 < max(tight) < 8
    assert set(none) == {1}
    assert max(sizes(0, batch_size=5)) == 5


def test_tasks_of_a_shared_prefix_run_side_by_side_so_that_few_are_held_at_a_time(tmp_path):
    """Tools drawn from ten, in any order: prefixes branch at every tool. As many are held as continue one another."""
    draw = random.Random(0)
    tools = [{"name": f"tool_{n}", "description": f"Does {n}.", "parameters": {}} for n in range(10)]
    lines = [
        {"id": f"t{n}", "kind": "tool_selection", "input": f"Do {n}.", "tools": draw.sample(tools, 4), "target": None}
        for n in range(150)
    ]  # fmt: skip
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shape = Shape(4, 4, 2, 64, 16, 16, 128, 300, 8192)
    tasks = read_inputs(tmp_path / "tasks.jsonl", Options()).tasks
    plans = plan(tasks, tiny("tiny-llama").tokenizer, shape, Options())
    (group,) = schedule(plans, shape, Options(batch_size=1))
    jobs = [job for batch in group.batches for entry in batch for job in entry.jobs]
    assert sorted(job.task_id for job in jobs) == sorted(line["id"] for line in lines)
    left = Counter(tuple(job.prompt.token_ids[:end]) for job in jobs for end in job.prefix_ends)
    held: set[tuple[int, ...]] = set()
    for job in jobs:
        branch = {tuple(job.prompt.token_ids[:end]) for end in job.prefix_ends}
        assert held <= branch
        left.subtract(branch)
        held = {key for key in held | branch if left[key]}
    assert max(len(job.prefix_ends) for job in jobs) > 2 and not held


def test_a_cache_of_an_earlier_batch_leaves_no_trace():
    model = tiny("tiny-gpt2")
    spec = CaptureSpec(frozenset(SITES))
    outcomes: dict[int, object] = {}
    capturer = Capturer(model, model.codec, spec, Generation(5))
    for text in ("A long text that fills the cache with something. " * 4, "Short."):
        job = probe.capture.Job(prompt_of(text, model.codec, 5), text)
        capturer.run([job, job], outcomes.__setitem__)
    fresh = run_batch(model, model.codec, [job], spec, Generation(5))[0]
    for name, tensor in fresh.tensors.items():
        assert torch.allclose(outcomes[0].tensors[name].float(), tensor.float(), atol=1e-5), name


def grouped(n_groups: int, size: int) -> list[probe.capture.Job]:
    """Jobs in groups that share a text, all of which begin alike."""
    model = tiny("tiny-llama")
    return [
        probe.capture.Job(
            prompt_of(
                [
                    Segment("An instruction that all of them share. ", "system"),
                    Segment(f"{group} belongs to group {group} alone, as does this. ", "example:1"),
                    Segment(f"Question {number}?", "user"),
                ],
                model.codec,
                2,
            ),
            f"{group}-{number}",
        )
        for group in range(n_groups)
        for number in range(size)
    ]


def test_a_prefix_is_run_once_and_dropped_when_no_job_needs_it_any_more():
    model, jobs = tiny("tiny-llama"), grouped(12, 3)
    order = plan_shared(jobs)
    needed = {tuple(job.prompt.token_ids[:end]) for job in jobs for end in job.prefix_ends}
    longest = {
        key: max((len(k) for k in needed if len(k) < len(key) and key[: len(k)] == k), default=0)
        for key in needed
    }
    capturer = Capturer(model, model.codec, CaptureSpec(frozenset({"logits"})), Generation(2))
    capturer.prefixes.expect(jobs)
    sizes = []
    for start in range(0, len(order), 4):  # batches that cut groups
        capturer.run([jobs[index] for index in order[start : start + 4]], lambda *_: None)
        sizes.append(capturer.prefixes.size)
    assert len(needed) >= 13
    assert capturer.prefixes.tokens_run == sum(len(key) - longest[key] for key in needed)
    position = 2 * model.facts.n_layers * model.facts.n_kv_heads * model.facts.d_head * 4
    assert max(sizes) <= position * (min(map(len, needed)) + max(map(len, needed))), "common and group's own"
    assert sizes[-1] == 0


def test_prefixes_of_jobs_that_nobody_announced_are_found_again_within_the_limit():
    model = tiny("tiny-llama")
    spec = CaptureSpec(frozenset({"logits"}))
    capturer = Capturer(model, model.codec, spec, Generation(2))
    for _ in range(2):
        jobs = grouped(3, 2)
        for index in plan_shared(jobs):
            capturer.run([jobs[index]], lambda *_: None)
    needed = {tuple(job.prompt.token_ids[:end]) for job in jobs for end in job.prefix_ends}
    common = min(map(len, needed))
    assert capturer.prefixes.tokens_run == common + sum(len(key) - common for key in needed) > 0
