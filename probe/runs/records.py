"""Records of finished tasks: what record.json holds, one struct a kind of task.

A record may have more fields than its struct: those of another version are ignored. A field that older runs lack
has a default. record.json has the fields of its only passage and of its decision beside its own; here they are parts
of their own, `passage` and `decision`. Positions count from 0 in the token ids of their passage, ranges are half-open, log-probabilities
are in nats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from probe.runs.files import RECORD, RUN, FileFault
from probe.tasks.answer_types import AnswerType

Target = str | list[str | None] | None
"""Acceptable tools as a task file gives them: one name, several, or null for no tool."""


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all parts of a record: immutable, fields by name."""


class ToolPart(Struct, frozen=True, kw_only=True):
    """Where a part of a tool's definition stands, as stored (of `probe.prompts`)."""

    part: str
    """`name`, `description` or `parameters`; a part may stand in several places."""
    start: int
    """First position."""
    end: int
    """Position behind the last one."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"{self.start} to {self.end} is no range of positions")


class Span(Struct, frozen=True, kw_only=True):
    """A labelled range of positions as stored, with its text (of `probe.prompts`)."""

    label: str
    """`bos`, `user`, `tool:NAME`, …: see `probe.prompts.labels`."""
    start: int
    """First position."""
    end: int
    """Position behind the last one."""
    text: str | None = None
    """Text of its tokens; older runs have none."""
    parts: tuple[ToolPart, ...] = ()
    """Of a tool: its parts in order; empty where none could be placed, and in older runs."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"{self.start} to {self.end} is no range of positions")

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.end - self.start


class Template(Struct, frozen=True, kw_only=True):
    """How a prompt was rendered."""

    name: str = ""
    """`chat`, `chat with tools`, `raw`, …"""
    fallback: str | None = None
    """Why the model's own template was not used, null where it was."""
    no_tool_name: str | None = None
    """Name under which no tool is listed, null where it is the complement of the call opener."""
    reply: str | None = None
    """How an agent's tool results are given back."""


class ReplayAgreement(Struct, frozen=True, kw_only=True):
    """How far the model agrees with the log that it replayed, or with the generator of its tokens, as stored (of
    `probe.maths.agreement`)."""

    n_tokens: int
    """Tokens that the log or the generator emitted."""
    argmax_share: float
    """Share of them that are the model's argmax."""
    disagrees: bool
    """Whether the model is beyond the bound."""
    n_log_probs: int = 0
    """Tokens of which it has the log-probability."""
    mean_delta_log_prob: float | None = None
    """Mean of |Δ log p| over these, nats; null without any."""
    largest_delta_log_prob: float | None = None
    """Largest of them."""


class Passage(Struct, frozen=True, kw_only=True):
    """One prompt and what the model continued it with, as stored (of `probe.capture`, without tensors)."""

    prompt: str
    """Exact text of the prompt."""
    token_ids: list[int]
    """Token ids of prompt and completion."""
    n_prompt: int
    """Number of tokens of the prompt."""
    n_new: int
    """Number of generated tokens."""
    completion: str
    """Text of the generated tokens."""
    token_characters: list[int] | None = None
    """Characters of `completion` that each generated token completes, 0 for one that cuts a character or ends the turn;
    null where its text does not come apart so, and in older runs."""
    finish_reason: str
    """Why generation ended: `eos`, `length`, `stop` or `error`; `prefill` where nothing was to be generated."""
    spans: list[Span]
    """Labelled ranges in order of position; a label may occur more than once."""
    template: Template = Template()
    """How the prompt was rendered."""
    truncation: dict[str, Any] | None = None
    """Rule by which a prompt that did not fit was shortened, and the tokens dropped."""
    replay_agreement: ReplayAgreement | None = None
    """How far the model agrees with the generator of the tokens; null where it chose them itself."""

    @property
    def generated(self) -> bool:
        """Whether there is a completion: not of a run that prefills alone."""
        return self.finish_reason != "prefill"

    @property
    def n_run(self) -> int:
        """Number of positions that were run: the last emitted token never is."""
        return self.n_prompt + self.n_new - 1

    @property
    def lengths(self) -> dict[str, int]:
        """Label → number of positions, in order of first appearance."""
        lengths: dict[str, int] = {}
        for span in self.spans:
            lengths[span.label] = lengths.get(span.label, 0) + span.length
        return lengths

    @property
    def tool_parts(self) -> dict[tuple[str, str], int]:
        """(label, part) → number of positions, in order of first appearance."""
        lengths: dict[tuple[str, str], int] = {}
        for span in self.spans:
            for part in span.parts:
                key = span.label, part.part
                lengths[key] = lengths.get(key, 0) + part.end - part.start
        return lengths

    def positions(self, label: str) -> list[int]:
        """Positions of a label."""
        return [p for span in self.spans if span.label == label for p in range(span.start, span.end)]

    def emitting(self, label: str) -> list[int]:
        """Positions of the rows that emitted the tokens of a label, those of the prompt left out."""
        return [p - 1 for p in self.positions(label) if p >= self.n_prompt]


class ScoredCandidate(Struct, frozen=True, kw_only=True):
    """One scored continuation."""

    log_prob: float
    """Log-probability of the whole candidate."""
    probability: float
    """Softmax of `log_prob` over all candidates."""
    token_ids: list[int]
    """Token ids that were scored."""


class ToolProbability(ScoredCandidate, frozen=True, kw_only=True):
    """P(tool | context) of one candidate of a decision."""

    tool: str | None
    """Name of the tool, null for no tool."""
    choice_probability: float | None = None
    """Softmax over the tools alone; no tool has none."""
    token_log_probs: list[float] | None = None
    """Log-probability of each token of the name, without the call opener; older runs have none."""


class ChoiceProbability(ScoredCandidate, frozen=True, kw_only=True):
    """Probability of one given choice of a prompting task."""

    choice: str
    """Text of the choice."""


class Call(Struct, frozen=True, kw_only=True):
    """A call as the model wrote it, as stored (of `probe.tools.calls`)."""

    name: str | None = None
    """Name of the tool, null where the listed "no tool" was called."""
    arguments: Any = None
    """Arguments as generated."""
    text: str | None = None
    """Text of the call in an agent's turn."""


class Decision(Struct, frozen=True, kw_only=True):
    """One choice among tools: candidates, scores, and what was called."""

    tool_probabilities: Annotated[list[ToolProbability], msgspec.Meta(min_length=1)]
    """Shown tools in shown order, then no tool."""
    chosen: str | None
    """Most probable candidate, null for no tool."""
    chosen_tool: str
    """Most probable tool, also where no tool at all is more probable."""
    candidate_mass: float
    """Sum of the candidates' probabilities before the softmax."""
    opener_log_prob: float | None = None
    """Log-probability of the call opener; null where it was not scored."""
    called: str | None = None
    """Tool that the generated text calls, null for none."""
    call: Call | None = None
    """Call as generated, null for none."""
    calls: list[Call] | None = None
    """All calls as generated, where the task allows several at once and more than one was made."""
    call_error: str | None = None
    """What is wrong with the call, null for a right one."""
    call_error_kind: str | None = None
    """One of `probe.tools.calls.KINDS`, null for a right call."""

    def __post_init__(self) -> None:
        if self.chosen not in self.names or self.chosen_tool not in self.tools:
            raise ValueError(f"{self.chosen!r}, {self.chosen_tool!r} were chosen: no candidates")

    @property
    def names(self) -> list[str | None]:
        """Candidates: shown tools in shown order, null for no tool."""
        return [entry.tool for entry in self.tool_probabilities]

    @property
    def tools(self) -> list[str]:
        """Shown tools in shown order."""
        return [entry.tool for entry in self.tool_probabilities if entry.tool is not None]


class Result(Struct, frozen=True, kw_only=True):
    """What a tool gave back to an agent."""

    content: str
    """Text that the model is shown."""
    error: str | None = None
    """Kind of failure, null for none."""
    message: str | None = None
    """Failure in a sentence."""
    printed: str | None = None
    """What a program printed."""
    seconds: float | None = None
    """Time that the tool ran."""
    shown: bool = False
    """Whether the model got to read it."""
    tokens_left_out: int = 0
    """Tokens by which it was cut."""


class FurtherCall(Decision, frozen=True, kw_only=True):
    """The decision of a call behind the first one of a turn."""

    position: int
    """Position of the decision."""


class Turn(Decision, frozen=True, kw_only=True):
    """One turn of an agent as stored (of `probe.capture.transcript`): what it wrote, and its decision."""

    turn: int
    """Number of the turn, from 1."""
    start: int
    """Position of the first token that the model emitted in it."""
    end: int
    """Position behind the last one."""
    text: str
    """Text of its tokens."""
    position: int
    """Position of the decision."""
    slot: str
    """`reached` by the turn's own call, `attached` on the side, or `forced`."""
    result: Result | None = None
    """What came back, null where nothing was called."""
    further_calls: list[FurtherCall] | None = None
    """Of a transcript that is replayed the decisions of the turn's other calls, null for none; measures take the first alone."""


class BfclVerdict(Struct, frozen=True, kw_only=True):
    """The function-calling leaderboard's verdict on a call as stored (of `probe.tools.calls.bfcl`)."""

    valid: bool
    """Whether the call is right."""
    error: str | None = None
    """Kind of error, null for none."""
    message: str | None = None
    """Error in a sentence."""
    handler: str | None = None
    """The leaderboard's handler by whose rule the text was decoded; null where nothing was called, in older runs."""


class TaskRecord(Struct, frozen=True, kw_only=True):
    """What the records of all kinds have."""

    id: str
    """Id of the task."""
    kind: str
    """Kind of task."""
    status: str
    """`ok`, `truncated`, `nonfinite` or `error`."""
    seconds: float = 0.0
    """Time that the task took."""
    metadata: dict[str, Any] | None = None
    """Metadata of the task file."""
    score: float | None = None
    """Score, null where the task gives no target."""
    error: str | None = None
    """Why the task could not be run to its end."""
    target: Any = msgspec.UNSET
    """Target as in the task file, unset where it gives none."""

    @property
    def family(self) -> str | None:
        """Family of tasks that the metadata names."""
        family = (self.metadata or {}).get("family")
        return family if isinstance(family, str) else None


class PassageRecord(TaskRecord, frozen=True, kw_only=True):
    """What the records of the kinds with one passage have."""

    passage: Passage
    """Prompt and completion."""


class FailedRecord(TaskRecord, frozen=True, kw_only=True):
    """Record of a task of any kind that could not be run to its end."""


class ToolRecord(PassageRecord, frozen=True, kw_only=True):
    """Record of a `tool_selection` task."""

    decision: Decision
    """Choice at the last position of the prompt."""
    target: Target  # pyright: ignore[reportGeneralTypeIssues]
    """Acceptable tools as in the task file, which always gives them."""
    call_prefix: str | None = None
    """Call opener with which the prompt ends."""
    no_tool: str | None = None
    """How no tool is scored: `listed` as a candidate, or as `complement` of the call opener."""
    bfcl: BfclVerdict | None = None
    """The leaderboard's verdict, null for a task that is not of it."""

    @property
    def right(self) -> tuple[str | None, ...]:
        """Acceptable choices, null for no tool; never empty."""
        return acceptable(self.target)

    @property
    def calls_right(self) -> bool | None:
        """Whether the generated text is right: an acceptable tool with valid arguments, or no call where that is right; null
        where none was to be generated.

        The prompt ends with the call's opener. Where no tool is the complement of that opener, a probability of the
        opener below one half counts as no call.
        """
        if not self.passage.generated:
            return None
        opener = self.decision.opener_log_prob
        if self.no_tool == "complement" and opener is not None and opener < -math.log(2):
            return None in self.right
        called = {call.name for call in self.decision.calls or ()} | {self.decision.called}
        return self.decision.call_error is None and called <= set(self.right)


class AgentRecord(PassageRecord, frozen=True, kw_only=True):
    """Record of an `agent` task; the passage is the transcript."""

    turns: Annotated[list[Turn], msgspec.Meta(min_length=1)]
    """Turns in order."""
    ended_by: str = ""
    """`answer`, `length` or `max_turns`."""
    answer: str | None = None
    """Text of the last turn, null where that is a call."""
    expected_answer: str | float | int | None = None
    """Answer to reach, null where the task gives none."""
    reached_answer: bool | None = None
    """Whether the answer says the expected one."""
    target: Target | msgspec.UnsetType = msgspec.UNSET
    """Acceptable tools as in the task file; null for no tool, unset where it gives none."""
    called_target: bool | None = None
    """Whether an acceptable tool was called rightly (for no tool: none at all was called)."""
    call_prefix: str | None = None
    """Call opener."""
    no_tool: str | None = None
    """How no tool is scored: `listed` as a candidate, or as `complement` of the call opener."""

    @property
    def right(self) -> tuple[str | None, ...]:
        """Acceptable choices, null for no tool; empty where the task gives no target."""
        return () if isinstance(self.target, msgspec.UnsetType) else acceptable(self.target)


class ReplayRecord(AgentRecord, frozen=True, kw_only=True):
    """Record of a `replay` task: a transcript that was given."""

    replay_agreement: ReplayAgreement
    """How far the model agrees with the log."""


class CotRecord(PassageRecord, frozen=True, kw_only=True):
    """Record of a `cot` task."""

    steps: list[str] = []
    """Text of each step of the reasoning."""
    answer: str | None = None
    """Answer that was given, null for none."""
    answer_forced: bool = False
    """Whether the cue of the answer was given to the model."""
    target: str | float | int | None = None
    """Right answer, null where the task gives none."""
    answer_type: AnswerType | None = None
    """How answers are compared, null for by the form of the right one."""


class VariantPassage(Passage, frozen=True, kw_only=True):
    """Passage of one variant of a prompting task."""

    choice_probabilities: list[ChoiceProbability] | None = None
    """Given choices with their probabilities, null where the task gives none."""
    chosen: str | None = None
    """Most probable choice."""
    candidate_mass: float | None = None
    """Sum of the choices' probabilities before the softmax."""
    score: float | None = None
    """1 where the target is chosen, else 0; null without a target."""


class PassagesRecord(TaskRecord, frozen=True, kw_only=True):
    """What the records of the kinds with several passages have."""

    passages: dict[str, VariantPassage]
    """Passage of each variant, by its name."""


class PromptingRecord(PassagesRecord, frozen=True, kw_only=True):
    """Record of a `prompting` task."""

    target: str | None = None
    """Right choice, null where the task gives none."""


RECORDS: dict[str, type[TaskRecord]] = {
    "tool_selection": ToolRecord,
    "agent": AgentRecord,
    "replay": ReplayRecord,
    "cot": CotRecord,
    "prompting": PromptingRecord,
}
"""Struct of each kind of task; a kind of another package has the fields of `TaskRecord`. They stand here and not in
`probe.tasks.KINDS` because tasks come before runs."""


class HeaderAlibi(Struct, frozen=True, kw_only=True):
    """A bias that grows with the position of the key (of `probe.maths.reads.Alibi`)."""

    slopes: list[float]
    factor: float = 1.0
    rounded: bool = False


class HeaderAttention(Struct, frozen=True, kw_only=True):
    """How a layer turns queries and keys into a pattern, in run.json (of `probe.maths.reads`)."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    alibi: HeaderAlibi | None = None
    chunk: int | None = None


class HeaderLayer(Struct, frozen=True, kw_only=True):
    """What a layer is, in run.json (of `probe.model.structure.LayerFacts`)."""

    kind: str
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_value: int
    memory: int
    state_bytes: int = 0
    gated: bool = False


class HeaderModel(Struct, frozen=True, kw_only=True):
    """The model in run.json."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    dtype: str | msgspec.UnsetType = msgspec.UNSET
    device: str | msgspec.UnsetType = msgspec.UNSET
    n_params: int | msgspec.UnsetType = msgspec.UNSET
    n_layers: int | msgspec.UnsetType = msgspec.UNSET
    n_heads: int | msgspec.UnsetType = msgspec.UNSET
    n_kv_heads: int | msgspec.UnsetType = msgspec.UNSET
    d_model: int | msgspec.UnsetType = msgspec.UNSET
    d_head: int | msgspec.UnsetType = msgspec.UNSET
    d_value: int | msgspec.UnsetType = msgspec.UNSET
    attention: list[HeaderAttention | None] | msgspec.UnsetType = msgspec.UNSET
    layers: list[HeaderLayer] | msgspec.UnsetType = msgspec.UNSET
    norm: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET


class HeaderFile(Struct, frozen=True, kw_only=True):
    """The task file in run.json."""

    path: str
    sha256: str | None = None
    n_tasks: int = 0


class HeaderCapture(Struct, frozen=True, kw_only=True):
    """What was captured of a kind of task, in run.json."""

    sites: list[str]
    layers: list[int] = []
    rows: list[str] | msgspec.UnsetType = msgspec.UNSET
    """Which positions have a row; runs of earlier versions have none."""
    all_rows: bool = False


class RunHeader(Struct, frozen=True, kw_only=True):
    """The keys of run.json that are read: any of them may be absent, none may be of another type."""

    argv: list[str] = []
    options: dict[str, Any] = {}
    task_file: HeaderFile | None = None
    task_ids: list[str] | None = None
    kinds: list[str] | None = None
    model: HeaderModel | str | None = None
    template: dict[str, Any] | None = None
    generation: dict[str, dict[str, Any]] = {}
    capture: dict[str, HeaderCapture] = {}
    packages: dict[str, str] = {}


T = TypeVar("T", bound=TaskRecord)


def check_header(run: Mapping[str, Any], path: Path) -> None:
    """Raise a Fault that names run.json of the run `path` where one of its keys has another type."""
    try:
        msgspec.convert(run, RunHeader)
    except msgspec.ValidationError as error:
        raise FileFault(path / RUN, "altered", str(error)) from error


def acceptable(target: Target) -> tuple[str | None, ...]:
    """Acceptable choices of a target, null for no tool; never empty."""
    return tuple(target) if isinstance(target, list) and target else (target or None,)  # type: ignore[arg-type]


def struct_of(record: Mapping[str, Any]) -> type[TaskRecord]:
    """The struct of a record, by its kind and by whether it ran to its end."""
    return FailedRecord if "error" in record else RECORDS.get(record.get("kind", ""), TaskRecord)


def decode(record: Mapping[str, Any], struct: type[T], directory: Path) -> T:
    """A record as its struct. Raises a Fault that names record.json in `directory` and the wrong field."""
    parts = dict.fromkeys({"passage", "decision"} & set(struct.__struct_fields__), record)
    try:
        return msgspec.convert({**record, **parts}, struct)
    except msgspec.ValidationError as error:
        reason = re.sub(r"\$\.(passage|decision)\b(?=`|[.\[])", "$", str(error))
        raise FileFault(directory / RECORD, "altered", reason) from error
