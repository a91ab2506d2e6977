"""The only room that calls probe: loading, rendering, generation with capture, scoring, prefill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.timing import now

if TYPE_CHECKING:
    from probe.capture import Outcome
    from probe.capture.model import CapturingModel
    from probe.harness.plan import TaskPlan
    from probe.prompts import Prompt

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ours:
    """A loaded model and how it was asked for."""

    model: CapturingModel
    name: str
    dtype: str
    device: str

    @property
    def hf(self) -> Any:
        """The plain transformers model; it stays plain while probe does not run."""
        return self.model.hf

    @property
    def first_block(self) -> Any:
        return self.model.blocks[0]


def load(name: str, dtype: str, device: str) -> Ours:
    import probe

    model = probe.load(name, dtype=dtype, device=device)
    return Ours(model, name, dtype, str(model.device))


# -- inputs ------------------------------------------------------------------------------------------------------


def shipped_tasks() -> tuple[Any, ...]:
    """The tool tasks of the repository."""
    from probe.harness.plan import Options, read_inputs

    return read_inputs(ROOT / "tasks/tools.jsonl", Options()).tasks


def shipped_tools() -> list[Any]:
    from probe.tools.definitions import read_catalogue

    return list(read_catalogue(ROOT / "tools").values())


def tool_task(task_id: str, text: str, tools: Iterable[Any]) -> Any:
    from probe.tasks import Message, ToolTask

    return ToolTask(id=task_id, messages=(Message("user", text),), tools=tuple(tools))


def terse(tool: Any, suffix: str = "", description: str = "") -> Any:
    """The tool with the first sentence of its description and no parameters; or one named like it."""
    from probe.tools.definitions import Tool

    return Tool(name=tool.name + suffix, description=description or tool.description.split(". ")[0] + ".")


def render(ours: Ours, tasks: Sequence[Any], n_new: int) -> list[TaskPlan]:
    from probe.harness.plan import Options, plan

    options = Options(max_new_tokens=n_new)
    return plan(tasks, ours.model.tokenizer, ours.model.facts, options)


def without_no_tool(prompt: Prompt) -> Prompt:
    """The prompt with its tools alone as candidates."""
    return replace(prompt, candidates=tuple(c for c in prompt.candidates if c.name is not None))


# -- running -----------------------------------------------------------------------------------------------------


def generate(
    ours: Ours, plans: Sequence[TaskPlan], n_new: int, *, capture: str, out: Path | None
) -> list[Outcome]:
    """Run one batch, `n_new` tokens each whatever they are; with `out`, commit every task to a new run there.

    Candidates are scored as in a run. Returns when all that was committed is durable.
    """
    from probe.capture import Job

    jobs = [Job(replace(p.prompts[0], stop_ids=frozenset()), p.task.id) for p in plans]
    started = now(ours.device)
    outcomes = _run(ours, jobs, capture, n_new)
    if out is not None:
        from probe.harness.batches import package
        from probe.runs import RunWriter

        seconds = (now(ours.device) - started) / len(plans)
        with RunWriter.create(out, {"options": {}}) as writer:
            for plan, outcome in zip(plans, outcomes, strict=True):
                writer.commit(*package(plan, [outcome], seconds))
            writer.flush()
    return outcomes


def score(ours: Ours, prompt: Prompt) -> list[float]:
    """log P of every candidate of one prompt, nats: the prompt and all candidates, nothing captured."""
    from probe.capture import Job

    return _run(ours, [Job(prompt, "scored")], "none", 1)[0].candidate_log_probs


def prefill_seconds(ours: Ours, plans: Sequence[TaskPlan], share: bool) -> tuple[float, list[Outcome]]:
    """RE-AIM HERE when sharing changes: seconds to prefill all tasks with default capture, and the outcomes.

    Tasks run in the batches of a run, without candidates and with one token each, which needs no decode step:
    what is timed is finding what is shared, the prompts' forward, and the capture of what it computes.
    Outcomes come in the order of `plans`.
    """
    from probe.capture import Capturer, Job
    from probe.harness.plan import Options
    from probe.harness.schedule import schedule

    options = Options(max_new_tokens=1, capture="default")
    bare = [replace(p, jobs=[Job(replace(p.prompts[0], candidates=()), p.task.id)]) for p in plans]
    timings: dict[str, Any] = {}
    started = now(ours.device)
    for group in schedule(bare, ours.model.facts, options):
        capturer = Capturer(ours.model, ours.model.codec, group.spec, group.generation)
        for batch in group.batches:
            jobs = [plan.jobs[0] if share else replace(plan.jobs[0], shared=0) for plan in batch]
            ids = [job.task_id for job in jobs]
            capturer.run(jobs, lambda index, outcome, ids=ids: timings.__setitem__(ids[index], outcome))
    seconds = now(ours.device) - started
    return seconds, _all_finite([timings[plan.task.id] for plan in plans])


def _run(ours: Ours, jobs: Sequence[Any], capture: str, n_new: int) -> list[Outcome]:
    from probe.capture import CaptureSpec, Generation, run_batch

    spec = CaptureSpec.parse(capture, None, ours.model.facts.n_layers, memory=False)
    return _all_finite(run_batch(ours.model, ours.model.codec, jobs, spec, Generation(n_new)))


def _all_finite(outcomes: Sequence[Any]) -> list[Outcome]:
    from probe.capture import Outcome

    for outcome in outcomes:
        if not isinstance(outcome, Outcome):
            raise outcome
    return list(outcomes)


# -- a chain of thought --------------------------------------------------------------------------------------------


class Reasoning:
    """Random tokens laid out as a question, steps of about one length and an answer."""

    def __init__(self, ours: Ours, n_steps: int, n_tokens: int):
        import torch

        from probe.experiments.cot.knockouts import forwards
        from probe.runs.records import CotRecord, Passage, Span
        from probe.runs.views.chain import Chain

        self.model = ours.model
        draw = torch.Generator().manual_seed(0)
        self.token_ids: list[int] = torch.randint(
            3, self.model.facts.d_vocab, (n_tokens,), generator=draw
        ).tolist()
        start, end = n_tokens // 10, n_tokens - n_tokens // 50
        cuts = [start + (end - start) * k // n_steps for k in range(n_steps + 1)]
        bounds = {"bos": (0, 1), "question": (1, start)}
        bounds |= {f"step:{k}": (cuts[k - 1], cuts[k]) for k in range(1, n_steps + 1)}
        bounds["answer"] = (end, n_tokens)
        self.spans = [Span(label=label, start=a, end=b) for label, (a, b) in bounds.items()]
        self.n_prompt = start
        passage = Passage(
            prompt="",
            token_ids=self.token_ids,
            n_prompt=start,
            n_new=n_tokens - start,
            completion="",
            finish_reason="eos",
            spans=self.spans,
        )
        self.chain = Chain(CotRecord(id="r", kind="cot", status="ok", passage=passage))
        self.forwards = forwards(self.chain, ["knockouts"])

    def knockouts(self) -> Any:
        from probe.experiments.cot.knockouts import chain_rows

        return chain_rows(self.chain, ["knockouts"], self.model)

    def prefill(self, *, reads: bool) -> Any:
        """The sequence run with its reads of every row behind the prompt, or with nothing kept."""
        import torch

        from probe.capture.passage import Host, Passage, tensors
        from probe.capture.prefill import Part, prefill
        from probe.capture.spec import CaptureSpec
        from probe.model.attention import KVCache, Recorder
        from probe.prompts import Span

        model, layers = self.model, list(range(self.model.facts.n_layers))
        recorder = Recorder(queries=reads, layers=frozenset(layers))
        cache, first = KVCache(1, len(self.token_ids)), self.n_prompt - 1
        with model.recording(recorder):
            part = Part(0, self.token_ids[:-1], 0, first, first, (), ())
            ran = prefill(model, recorder, cache, [part])[0]
            if not reads:
                return ran
            spans = [Span(span.label, span.start, span.end) for span in self.spans]
            passage = Passage(
                token_ids=self.token_ids,
                spans=spans,
                labels=[span.label for span in spans],
                recorded_at=list(range(first, len(self.token_ids) - 1)),
                rows=list(range(first, len(self.token_ids) - 1)),
                n_prefilled=len(self.token_ids),
                prompt_labels=[],
                span_sums={},
                keys={layer: cache.keys[layer][0] for layer in layers},
                values={layer: cache.values[layer][0] for layer in layers},
                recorded={
                    name: {layer: torch.cat(parts) for layer, parts in by_layer.items()}
                    for name, by_layer in ran.states.items()
                },
                decisions=[first],
            )
            spec = CaptureSpec(frozenset({"attn_to_spans", "value_to_spans"}))
            return tensors(model, spec, layers, passage, Host(model.device))
