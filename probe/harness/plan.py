"""What a run will do: its options, and its tasks rendered."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from probe.errors import BadInput, ProbeError, UsageError
from probe.harness.generators import check_options, refuse_edits, refuse_misfit, without_tokens
from probe.jsontext import StrictJsonError, loads, printable, quoted
from probe.tasks import (
    Setting,
    Task,
    TaskFile,
    find_catalogue,
    in_shard,
    kind_named,
    kind_of,
    read_tasks,
    select,
)
from probe.tasks.shipped import shipped_path
from probe.tools.definitions import read_catalogue

if TYPE_CHECKING:
    from probe.capture import CaptureSpec, Generation, Job
    from probe.capture.edits import Steering
    from probe.prompts import Codec, Prompt
    from probe.tasks import Kind
    from probe.tools.definitions import Tool

_SHOWN = 5
"""Tasks without a prompt that are named before a run."""


_CHOICES = {"dtype": ("float32", "bfloat16", "float16")}
"""What the command line offers for an option, for those who do not come from there."""


@dataclass(frozen=True)
class Options:
    """The choices that decide what a run computes; saved in run.json, compared on resume."""

    model: str = "smollm2-135m"
    dtype: str = "float32"
    device: str = "cpu"
    revision: str | None = None
    tools: str | None = None
    tool_files: tuple[str, ...] = ()
    limit: str | None = None
    task_ids: tuple[str, ...] = ()
    shard: str | None = None
    """I/N: the tasks whose ids fall into the I-th of N parts."""
    seed: int = 0
    batch_size: int | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    system: str | None = None
    """Text of the system message of every task, in place of its own."""
    reasoning: str = "generate"
    tool_choice: str = "auto"
    capture: str | None = None
    layers: str | None = None
    rows: str | None = None
    """Which positions have a row (`probe.capture.spec.ROWS`); None: as `capture` says, else one a generated token."""
    max_bytes: int | None = None
    template_args: tuple[str, ...] = ()
    """KEY=VALUE each: variables of the chat template."""
    date: str | None = None
    """ISO 8601, without a time zone: what a chat template is told that asks for the date."""
    generator: str = "probe"
    """What chooses the tokens (`probe.harness.generators`)."""
    generator_url: str | None = None
    generator_model: str | None = None
    """Name under which the generator's server serves the model."""
    batch_bytes: int | None = None
    """Bytes that a batch may take where `batch_size` is None: as when the run began, so that its batches stay the same."""
    offline: bool = field(default=False, compare=False)

    def capture_spec(self, kind: str, n_layers: int) -> CaptureSpec:
        """What is captured of tasks of a kind, of a model with so many layers. Raises UsageError."""
        from probe.capture import CaptureSpec

        return CaptureSpec.parse(
            self.capture, self.layers, n_layers, memory=self._kind(kind).memory, rows=self.rows
        )

    def _kind(self, name: str) -> Kind:
        known = kind_named(name)
        if known is None:
            raise UsageError(f"no installed package has tasks of the kind {name!r}")
        return known

    def generation(self, kind: str) -> Generation:
        from probe.capture import Generation

        known = self._kind(kind)
        limit = self.max_new_tokens or known.max_new_tokens
        return Generation(limit, self.temperature, self.top_p, self.top_k, self.seed)


@dataclass
class TaskPlan:
    """One task, rendered."""

    task: Task
    prompts: list[Prompt]
    jobs: list[Job]
    fault: str | None = None
    """Why it cannot be shown to the model; then there are neither prompts nor jobs."""


class Inputs(NamedTuple):
    """What a run is given."""

    file: TaskFile
    tasks: tuple[Task, ...]
    """The selected ones, of a shard its part of them."""
    n_selected: int
    """How many are selected, those of other shards included."""
    catalogue: Path | None
    """Where the catalogue was read from."""
    tools: dict[str, Tool] | None
    """The catalogue; None: there is none that can be used."""


def read_inputs(path: Path, options: Options) -> Inputs:
    """The task file, the selected tasks and the catalogue used; `probe:NAME` is a shipped file. Raises BadInput before any
    weights load, and UsageError for a shipped file that is none."""
    path = shipped_path(path)
    given = Path(options.tools) if options.tools else None
    return read_given(path, find_catalogue(path, given), options)


def read_given(path: Path, catalogue_path: Path | None, options: Options) -> Inputs:
    """As `read_inputs`, with the catalogue at this path or none."""
    broken: list[str] = []
    catalogue = None
    try:
        catalogue = read_catalogue(catalogue_path) if catalogue_path else None
    except BadInput as error:
        # A folder that merely is called tools must not stop a task file that names no tool of it.
        if options.tools:
            raise
        broken = error.problems
    try:
        file = read_tasks(path, catalogue, lambda: runnable(options.tool_files))
    except BadInput as error:
        asked = any("catalogue" in problem for problem in error.problems)
        if (rest := len(broken) - _FAULTS_OF_A_DEFAULT) > 0:
            more = f"{printable(str(catalogue_path), 4096)}: {rest} more mistakes: `probe tools list --tools` names all, if this is your catalogue"
            broken = [*broken[:_FAULTS_OF_A_DEFAULT], more]
        raise BadInput([*broken, *error.problems] if asked else error.problems) from None
    tasks = select(file.tasks, options.limit, options.task_ids)
    if options.system is not None:
        tasks = tuple(_under(task, options.system) for task in tasks)
    mine = in_shard(tasks, options.shard)
    return Inputs(file, mine, len(tasks), catalogue_path, catalogue)


_FAULTS_OF_A_DEFAULT = 3
"""Of a catalogue that nobody gave: it may be a folder of other files, and the task file's mistakes must be seen."""


def _under(task: Task, system: str) -> Task:
    """The task under the run's system message. Raises UsageError for a kind that takes none."""
    kind = kind_of(task)
    if kind.under is None:
        why = "give it to its variants" if kind.several else "it is run as it was"
        raise UsageError(f"--system: task {task.id!r} of the kind {kind.name} takes none: {why}")
    return kind.under(task, system)


def runnable(files: Sequence[str | Path]) -> dict[str, Tool]:
    """Definitions of the tools that can be run, those of the given Python files among them."""
    from probe.tools.execution import executables

    return {name: executable.tool for name, executable in executables(map(Path, files)).items()}


def _text(value: Any) -> str:
    if isinstance(value, str | PurePath | int) and not isinstance(value, bool):
        return str(value)
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else _no()


def _listed(value: Any) -> str:
    """`0,2` or `resid_post,logits` from the text itself, one entry, or several of them."""
    if isinstance(value, str | int):
        return _text(value)
    parts = [str(_whole(part)) if not isinstance(part, str) else part for part in _several(value)]
    return ",".join(parts) if parts else _no()


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | dict) else _no()


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(_text, [value] if isinstance(value, str | PurePath) else _several(value)))


def _arguments(value: Any) -> tuple[str, ...]:
    """`KEY=VALUE` texts, from a mapping as well."""
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return tuple(f"{key}={json.dumps(argument, ensure_ascii=False)}" for key, argument in items)
    return _texts(value)


def _instant(value: Any) -> str:
    return value.isoformat() if isinstance(value, date) else _text(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        _no()
    return int(value.__index__())


def _number(value: Any) -> float:
    return _no() if isinstance(value, bool | str) or not hasattr(value, "__float__") else float(value)


def _truth(value: Any) -> bool:
    return value if isinstance(value, bool) else _no()


def _batch_size(value: Any) -> int | None:
    return None if value == "auto" else _whole(value)


def _no() -> Any:
    raise TypeError


_READ: dict[str, tuple[Callable[[Any], Any], str]] = {
    **dict.fromkeys(("dtype", "device", "revision", "system", "reasoning", "tool_choice"), (_text, "a text")),
    **dict.fromkeys(("generator", "generator_url", "generator_model"), (_text, "a text")),
    "tools": (_text, "the path of a catalogue"),
    "limit": (_text, 'a number such as 10, or a range such as "11-20"'),
    "task_ids": (_texts, "an id or a list of ids"),
    "shard": (_text, 'a shard such as "1/4"'),
    "tool_files": (_texts, "a path or a list of paths"),
    "template_args": (_arguments, 'a mapping, as {"enable_thinking": False}, or a list of "KEY=VALUE"'),
    "date": (_instant, "a date, or a text as 2026-01-31"),
    "capture": (_listed, 'site names, as "resid_post,logits" or a list'),
    "layers": (_listed, 'layers, as 3, [0, 2] or "0,4-7"'),
    "rows": (_listed, 'words, as "decision,spans" or a list'),
    **dict.fromkeys(("seed", "max_new_tokens", "top_k", "max_bytes"), (_whole, "a whole number")),
    **dict.fromkeys(("temperature", "top_p"), (_number, "a number")),
    "batch_size": (_batch_size, 'a whole number or "auto"'),
    "offline": (_truth, "True or False"),
}
"""Option → what reads the value that a user of Python gives, and what it may be, in words."""


def make_options(name: str, given: dict[str, Any]) -> Options:
    """The options of a run, each in its one form, whatever form of it was given. Raises UsageError."""
    for option in given.keys() - _READ.keys():
        near = difflib.get_close_matches(option, _READ, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_READ)}"
        raise UsageError(f"run: no option {option!r}: {hint}")
    plain: dict[str, Any] = {}
    for option, value in given.items():
        if value is None:
            continue
        read, words = _READ[option]
        try:
            plain[option] = read(value)
        except TypeError:
            shown = printable(repr(value))
            raise UsageError(f"--{option.replace('_', '-')} {shown}: give {words}") from None
    choices = Options(model=name, **plain)
    for option, allowed in _CHOICES.items():
        if getattr(choices, option) not in allowed:
            raise UsageError(f"--{option} {getattr(choices, option)}: one of {', '.join(allowed)}")
    if choices.batch_size is not None and choices.batch_size < 1:
        raise UsageError(f"--batch-size {choices.batch_size}: a positive number or auto")
    if choices.reasoning not in ("generate", "reference"):
        raise UsageError(f"--reasoning {choices.reasoning}: generate or reference")
    if choices.tool_choice not in ("auto", "required"):
        raise UsageError(f"--tool-choice {choices.tool_choice}: auto or required")
    # Below, logits divided by it leave the range of float32; NaN fails every comparison.
    if not (choices.temperature == 0 or 1e-6 <= choices.temperature <= 1e6):
        raise UsageError(f"--temperature {choices.temperature}: 0 (greedy), or from 1e-6 to 1e6")
    if choices.max_new_tokens is not None and choices.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {choices.max_new_tokens}: at least 1")
    if choices.top_p is not None and not 0 < choices.top_p <= 1:
        raise UsageError(f"--top-p {choices.top_p}: a probability above 0, at most 1")
    if choices.top_k is not None and choices.top_k < 1:
        raise UsageError(f"--top-k {choices.top_k}: at least 1")
    if choices.system is not None and not choices.system.strip():
        raise UsageError("--system: is empty: give a text, or leave it out")
    if choices.rows is not None:
        from probe.capture.spec import parse_rows

        parse_rows(choices.rows)
    template_arguments(choices.template_args)
    check_options(choices)
    return replace(choices, date=_date(choices.date))


def _date(given: str | None) -> str:
    """A date and time without a zone: the one given, else that of the clock, so that a run can say which it was."""
    try:
        instant = datetime.fromisoformat(given) if given else datetime.now()
    except ValueError:
        raise UsageError(f"--date {given}: write it as 2026-01-31 or 2026-01-31T12:00:00") from None
    return instant.replace(tzinfo=None).isoformat(timespec="seconds")


def template_arguments(given: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE, with a value that is JSON or else a text. Raises UsageError."""
    arguments: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or name in arguments:
            fix = "give each once" if name in arguments else "write KEY=VALUE, such as enable_thinking=false"
            raise UsageError(f"--template-arg {text}: {fix}")
        try:
            arguments[name] = loads(value)
        except StrictJsonError:
            arguments[name] = value
    return arguments


def codec_of(
    tokenizer: Any, n_ctx: int, choices: Options, switches: Sequence[int] = (), stop_ids: Collection[int] = ()
) -> Codec:
    """What tokenises for a run, with its template arguments and its date. Raises UsageError for an argument that the
    chat template does not know."""
    from probe.prompts import Codec, PromptFault

    arguments = template_arguments(choices.template_args)
    try:
        return Codec(tokenizer, n_ctx, switches, stop_ids, template_arguments=arguments, date=choices.date)
    except PromptFault as fault:
        raise UsageError(str(fault)) from None


def plan(
    tasks: Sequence[Task],
    tokenizer: Any,
    shape: Any,
    choices: Options,
    edits: Sequence[Steering] = (),
    earlier: Callable[[str], Mapping[str, Any] | None] = lambda _task_id: None,
) -> list[TaskPlan]:
    """Render every task, its jobs under `edits`. `shape` gives n_ctx: facts of a loaded model, or a Shape without
    weights; `earlier` the record of a task that the run has already. Raises UsageError for an edit whose place no
    prompt has."""
    from probe.capture.edits import on_prompt, refuse_idle
    from probe.prompts import PromptFault
    from probe.tools.execution import executables

    refuse_edits(edits, choices)
    codec = codec_of(tokenizer, shape.n_ctx, choices)
    tools = cache(lambda: executables(map(Path, choices.tool_files)))
    plans = []
    for task in tasks:
        kind = kind_of(task)
        setting = Setting(
            choices.generation(kind.name).max_new_tokens + kind.reserve,
            reference=choices.reasoning == "reference",
            must_call=choices.tool_choice == "required",
            tools=tools,
            earlier=earlier,
        )
        try:
            prompts = kind.render(task, codec, setting)
            jobs = kind.jobs(task, prompts, setting)
            refuse_misfit(task, prompts, jobs, choices)
            jobs = without_tokens(jobs, choices)
            for job in jobs if edits else ():
                job.edits = on_prompt(edits, job.prompt)
            plans.append(TaskPlan(task, prompts, jobs))
        except PromptFault as fault:
            plans.append(TaskPlan(task, [], [], str(fault)))
        except ProbeError:
            raise
        except Exception as error:  # whatever a task raises is its own error and not the run's end
            plans.append(TaskPlan(task, [], [], f"{type(error).__name__}: {error}"))
    if edits and (prompts := [prompt for entry in plans for prompt in entry.prompts]):
        refuse_idle(edits, prompts)
    return plans


def repeated_calls(plans: Sequence[TaskPlan], choices: Options) -> str | None:
    """What to say before these tasks begin anew in a run that was stopped: calls that some of them may have made by then
    are made again. None where no task is shown a tool that could change anything."""
    from probe.tools.execution import BUILTIN, executables

    tasks = [plan.task for plan in plans if plan.jobs and kind_of(plan.task).calls]
    if not tasks:
        return None
    runnable = executables(map(Path, choices.tool_files))
    outside = {name for name, executable in runnable.items() if executable.source != BUILTIN}
    shown = [{tool.name for tool in getattr(task, "tools", ())} & outside for task in tasks]
    if not any(shown):
        return None
    n, names = sum(map(bool, shown)), ", ".join(map(quoted, sorted(set().union(*shown))))
    return f"{n} tasks begin again: calls of {names} that they may have made when the run stopped are made a second time"


_RENDERING = {
    "assumed_call": "the chat template writes no calls; this is taken to open one: {}",
    "closed_thought": "a thought without words is put before the call: {}",
    "calls_unread": "{}",
    "calls_lost": "calls that the chat template writes are not read back as they were: {}",
}
"""What to say of a prompt's `template`, by its parts."""


def notices(plans: Sequence[TaskPlan]) -> list[str]:
    """What a user should know before a run begins: prompts that no user of the model sends, tasks without a prompt."""
    prompts = [prompt for plan in plans for prompt in plan.prompts]
    lines = []
    for reason, count in Counter(filter(None, (p.template.get("fallback") for p in prompts))).items():
        lines.append(
            f"{count} of {len(prompts)} prompts are not as the model's own template writes them: {reason}"
        )
    told = (
        what.format(value if name.startswith("calls") else quoted(value))
        for prompt in prompts
        for name, what in _RENDERING.items()
        if (value := prompt.template.get(name))
    )
    lines += [f"{count} of {len(prompts)} prompts: {line}" for line, count in Counter(told).items()]
    faulty = [plan for plan in plans if plan.fault]
    lines += [f"{printable(plan.task.id)} cannot be run: {plan.fault}" for plan in faulty[:_SHOWN]]
    if len(faulty) > _SHOWN:
        lines.append(f"… and {len(faulty) - _SHOWN} more tasks cannot be run")
    return lines
