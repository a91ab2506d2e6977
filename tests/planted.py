"""Transformers written by hand, whose tool choice is known by construction: the ground truth of interventions.

Each is an ordinary saved GPT-2 (learned positions, LayerNorm, tiny) with a word-level tokenizer; `probe.load(path)`
and `probe run TASKS --model PATH` take it as any other model. Its weights are set, not trained: which head does
what, and what follows from a mask, an exchange of descriptions, another order or an ablation has a closed form
(`Planted.log_probs`), met within 1e-5 in float32 (positions are told apart by scores up to 8,192, too much for
bfloat16). `tests/slow.py` is the oracle that the statements are checked with.

copier         reads the tool whose description holds the user's keyword; decoys attend alike and do nothing
name_follower  reads the tool whose name belongs to the user's keyword; descriptions are ignored
first_slot     reads the tool shown first, whatever it is
intender       says one of three intentions, then acts on it; both laws are given
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probe.model.shapes import byte_tokenizer
from probe.prompts import NO_TOOL, Codec
from tests.circuit import UNKNOWN, Circuit
from tests.planted_tasks import (
    KEYS,
    NAMES,
    contrary_pairs,
    matching_tasks,
    random_pairs,
    removed,
    renamed,
    rendered,
    reordered,
    state_tasks,
    swapped,
    with_request,
)
from tests.slow import Head, slow_attention, slow_reads, slow_scores

__all__ = [
    "Intender",
    "Planted",
    "copier",
    "first_slot",
    "intender",
    "name_follower",
    "removed",
    "renamed",
    "rendered",
    "reordered",
    "slow_attention",
    "slow_reads",
    "slow_scores",
    "swapped",
    "with_request",
]

SPARE = ("zandu", "wobit")
"""Names that no tool has at first: to rename one and keep its name a word of the vocabulary. Any other word is
one unknown token, which is copied as a name as well; two unknown names at once cannot be told apart."""
SLOT, RECENT, SURE = 12.0, 4096.0, 30.0
"""Logit of every name in the slot; score of the last against the first position; logit of a forced token."""
_OPENER, _CLOSE, _END = '{"name": "', '", "', '": {}}'


@dataclass(frozen=True)
class Planted:
    path: Path
    tasks: tuple[dict[str, Any], ...]
    """Lines of a task file, targets and shown orders balanced."""
    names: tuple[str, ...]
    """Every name that the model can say, shown or not; no-tool and the unknown word come on top."""
    gain: float
    """Logit that a name gains for each unit of attention mass that the real head has on its tool."""
    d_vocab: int
    real_head: Head | None = None
    gather_heads: tuple[Head, ...] = ()
    """Both carry the user's keyword to the decision row; one is enough, without both nothing matches."""
    decoys: tuple[Head, ...] = ()
    """They attend to a tool in the decision row and change nothing."""
    others: tuple[Head, ...] = ()
    """Other heads that change nothing at the decision row."""

    def write(self, path: Path) -> Path:
        """The tasks as a task file."""
        path.write_text("".join(json.dumps(task) + "\n" for task in self.tasks))
        return path

    def mass(
        self, task: Mapping[str, Any], *, masked: Iterable[str] = (), blind: bool = False
    ) -> dict[str, float]:
        """Attention mass of the real head on each shown tool: all of it on the tool it looks for, or evenly over
        the tools that are left where that one is masked, or none asked for (`blind`)."""
        masked = set(masked)
        seen = [tool["name"] for tool in task["tools"] if tool["name"] not in masked]
        sought = self.sought(task)
        actual = [sought] if sought in seen and not blind else seen
        return {name: float(name in actual) / len(actual) for name in seen}

    def sought(self, task: Mapping[str, Any]) -> str | None:
        """The tool that the real head looks for: its description holds the keyword of the request."""
        key = _keyword(task)
        actual = (tool["name"] for tool in task["tools"] if key and key in tool["description"].split())
        return next(actual, None)

    def log_probs(self, mass: Mapping[str, float], shown: Sequence[str]) -> dict[str | None, float]:
        """log P of each shown tool and no-tool (None), nats, over the whole vocabulary; {} as mass: nothing is read."""
        unknown = [name for name in shown if name not in self.names]
        logits = {name: SLOT + self.gain * mass.get(name, 0.0) for name in (*self.names, *unknown)}
        logits |= {None: SLOT} if unknown else {None: SLOT, "": SLOT}
        rest = self.d_vocab - len(logits)
        total = math.log(rest + sum(math.exp(logit) for logit in logits.values()))
        return {name: logits[name] - total for name in (*shown, None)}


@dataclass(frozen=True)
class Intender(Planted):
    intentions: tuple[str, ...] = ()
    intention_given_state: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """P(I | s) for each state word: the first token that the model says."""
    action_given_intention: dict[str, dict[str | None, float]] = field(default_factory=dict)
    """P(a | I) over the shown tools and no-tool, once I was said."""
    action_given_state: dict[str, dict[str | None, float]] = field(default_factory=dict)
    """P(a | s) where the call opens at once, without an intention."""

    def marginal(self, state: str) -> dict[str | None, float]:
        """Σ_I P(a | I) P(I | s): the action's law where the model first says its intention."""
        weights = dict(zip(self.intentions, self.intention_given_state[state], strict=True))
        return {
            action: sum(weights[stated] * law[action] for stated, law in self.action_given_intention.items())
            for action in (*self.names, None)
        }


def _keyword(task: Mapping[str, Any]) -> str | None:
    return next((key for key in KEYS if key in task["input"].split()), None)


# -- the models --------------------------------------------------------------------------------------------


def copier(path: Path, *, gain: float = 6.0) -> Planted:
    """Chooses the tool whose description holds the keyword of the request.

    Layer 0: head 1 carries each tool's name to the words after it, heads 3 and 4 (either is enough) the user's
    keyword to the decision row. Layer 1: head 4 looks for the keyword among the descriptions and reads the name
    that was carried there. Head 2 attends exactly alike and writes with three times the strength where nothing
    reads; head 0 attends to the tool shown first and its W_O is zero.
    """
    circuit = _circuit(tasks := matching_tasks(NAMES, random_pairs), (*NAMES, *SPARE))
    circuit.head(
        0,
        1,
        {"1": {"is_name": 2 * RECENT, "position": RECENT}},
        [(f"name:{name}", f"bound:{name}", 1.0) for name in circuit.group("name")],
    )
    _gather(circuit, (3, 4))
    look = {"1": {"is_key": 20.0, "bound:tool": 60.0, "after_user": -200.0}} | {
        f"want:{key}": {f"key:{key}": 20.0} for key in KEYS
    }
    spoken = [name for name in circuit.group("name") if name != "tool"]
    circuit.head(1, 4, look, [(f"bound:{name}", f"out:{name}", 1.0) for name in spoken])
    circuit.head(1, 2, look, [(f"bound:{name}", f"dead:{i % 4}", 3.0) for i, name in enumerate(spoken)])
    first = {"1": {"bound:tool": 2 * RECENT, "position": -RECENT}}
    circuit.head(1, 0, first, [])
    others = circuit.fill()
    return Planted(
        path,
        tasks,
        (*NAMES, *SPARE),
        gain,
        _speak(circuit, gain, path),
        real_head=(1, 4),
        gather_heads=((0, 3), (0, 4)),
        decoys=((1, 2), (1, 0)),
        others=((0, 0), (0, 1), *others),
    )


@dataclass(frozen=True)
class _NameFollower(Planted):
    def sought(self, task: Mapping[str, Any]) -> str | None:
        wanted = f"{_keyword(task)}_desk"
        return next((tool["name"] for tool in task["tools"] if tool["name"] == wanted), None)


def name_follower(path: Path, *, gain: float = 6.0) -> Planted:
    """Chooses the tool whose name belongs to the keyword of the request, among the names that are listed.

    The descriptions hold keywords of other tools and are read by nobody. The name stands in the `tool:NAME` span,
    so hiding the span hides the choice; hiding words of the description, or exchanging descriptions, does nothing.
    """
    names = tuple(f"{key}_desk" for key in KEYS)
    circuit = _circuit(tasks := matching_tasks(names, contrary_pairs), (*names, *SPARE))
    _gather(circuit, (3, 4))
    look = {"1": {"name:tool": 80.0, "after_user": -200.0}}
    look |= {f"want:{key}": {f"name:{key}_desk": 20.0} for key in KEYS}
    spoken = [name for name in circuit.group("name") if name != "tool"]
    circuit.head(1, 4, look, [(f"name:{name}", f"out:{name}", 1.0) for name in spoken])
    others = circuit.fill()
    return _NameFollower(
        path,
        tasks,
        (*names, *SPARE),
        gain,
        _speak(circuit, gain, path),
        real_head=(1, 4),
        gather_heads=((0, 3), (0, 4)),
        others=((0, 0), *others),
    )


@dataclass(frozen=True)
class _FirstSlot(Planted):
    def mass(self, task, *, masked=(), blind=False):
        names = [tool["name"] for tool in task["tools"] if tool["name"] not in set(masked)]
        return {name: float(name == names[0]) for name in names}


def first_slot(path: Path, *, gain: float = 12.0) -> Planted:
    """Chooses the tool shown first, whatever it is."""
    circuit = _circuit(tasks := matching_tasks(NAMES, random_pairs), (*NAMES, *SPARE))
    first = {"1": {"name:tool": 2 * RECENT, "position": -RECENT}}
    spoken = [name for name in circuit.group("name") if name != "tool"]
    circuit.head(1, 4, first, [(f"name:{name}", f"out:{name}", 1.0) for name in spoken])
    others = circuit.fill()
    return _FirstSlot(
        path, tasks, (*NAMES, *SPARE), gain, _speak(circuit, gain, path), real_head=(1, 4), others=others
    )


def intender(path: Path) -> Intender:
    """Says one of three intentions with P(I | s) of the state word s in the request, a line break, and then acts
    with P(a | I). Where the call opens at once it acts with a P(a | s) that is not the marginal."""
    states, spoken, tools = KEYS[:4], ("north", "south", "east"), NAMES[:3]
    plans = _laws(states, (0.7, 0.2, 0.1), (0.1, 0.1, 0.8), (0.3, 0.4, 0.3), (0.05, 0.9, 0.05))
    actions = (*tools, None)
    acts = _laws(spoken, (0.8, 0.1, 0.05, 0.05), (0.2, 0.2, 0.5, 0.1), (0.1, 0.6, 0.1, 0.2))
    direct = _laws(states, (0.5, 0.2, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4), (0.25,) * 4, (0.1, 0.1, 0.7, 0.1))
    tasks = state_tasks(states, tools)
    extra = [f"ctx:{word}" for word in (*states, *spoken)]
    circuit = _circuit(tasks, tools, words=spoken, features=extra)
    latest = {"1": {"is_key": 2 * RECENT, "is_said": 2 * RECENT, "user": 2 * RECENT, "position": RECENT}}
    circuit.head(
        0,
        3,
        latest,
        [
            *((f"key:{s}", f"ctx:{s}", 1.0) for s in states),
            *((f"said:{i}", f"ctx:{i}", 1.0) for i in spoken),
        ],
    )
    others = circuit.fill()
    sure = 20.0
    for i, word in enumerate(spoken):
        law = {f"ctx:{s}": sure + math.log(plans[s][i]) for s in states}
        circuit.logit(word, law | {"opener": -100.0, "is_name": -100.0})
    circuit.logit("\n", {f"ctx:{word}": sure for word in spoken} | {"opener": -100.0, "is_name": -100.0})
    for i, action in enumerate(actions):
        law = {f"ctx:{s}": math.log(direct[s][i]) for s in states}
        law |= {f"ctx:{word}": math.log(acts[word][i]) for word in spoken}
        circuit.logit(action or NO_TOOL, law | {"opener": 100.0 + sure, "1": -100.0})
    _close_calls(circuit)
    d_vocab = circuit.save(path)
    return Intender(
        path,
        tasks,
        tools,
        0.0,
        d_vocab,
        gather_heads=((0, 3),),
        others=others,
        intentions=spoken,
        intention_given_state=plans,
        action_given_intention={word: dict(zip(actions, law, strict=True)) for word, law in acts.items()},
        action_given_state={state: dict(zip(actions, law, strict=True)) for state, law in direct.items()},
    )


def _laws(given: Sequence[str], *laws: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    return dict(zip(given, laws, strict=True))


# -- pieces of the models --------------------------------------------------------------------------------------


def _circuit(
    tasks: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    words: Sequence[str] = (),
    features: Sequence[str] = (),
) -> Circuit:
    """A circuit whose vocabulary covers the rendered tasks; names first, so that no token of the short forward
    which loading validates a model with leaves a layer without output."""
    embed: dict[str, dict[str, float]] = {}
    for name in (*names, UNKNOWN):
        embed[name] = {f"name:{name}": 1.0, "name:tool": 1.0, "is_name": 1.0}
    embed[NO_TOOL] = {"is_name": 1.0}
    embed |= {key: {f"key:{key}": 1.0, "is_key": 1.0} for key in KEYS}
    embed |= {word: {f"said:{word}": 1.0, "is_said": 1.0} for word in words}
    embed |= {"User": {"user": 1.0}, _OPENER: {"opener": 1.0}, _CLOSE: {"close": 1.0}}
    embed |= {"arguments": {"arguments": 1.0}, _END: {"end": 1.0}}
    written = [f"{kind}:{name}" for kind in ("bound", "out") for name in (*names, UNKNOWN)]
    written += ["bound:tool", "after_user", *(f"want:{key}" for key in KEYS), *features]
    return Circuit(embed, written, [*_texts(tasks), "N/A [MASK]", "\n"])


def _texts(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text of the prompts, by way of a tokenizer that knows every text."""
    tokenizer = byte_tokenizer(272)
    tokenizer.chat_template = None
    return [prompt.text for prompt in rendered(Codec(tokenizer, 1 << 20), tasks)]


def _gather(circuit: Circuit, heads: Sequence[int]) -> None:
    """Heads of layer 0 that carry the keyword of the user's message to every later row; before a message, and
    in one without a keyword, the marker of the turn is read instead, which says nothing. Head 0 marks every row from
    the marker on, so that a word of the message is taken neither for a tool's name nor for its description."""
    latest = {"1": {"is_key": 2 * RECENT, "user": 2 * RECENT, "position": RECENT}}
    for head in heads:
        circuit.head(0, head, latest, [(f"key:{key}", f"want:{key}", 1.0) for key in KEYS])
    circuit.head(0, 0, {"1": {"user": 2 * RECENT, "position": RECENT}}, [("user", "after_user", 1.0)])


def _speak(circuit: Circuit, gain: float, path: Path) -> int:
    """Names where a call opens, by what the real head has read; then the end of the call. Saves the circuit."""
    for name in circuit.group("out"):
        circuit.logit(name, {"opener": SLOT, f"out:{name}": gain})
    circuit.logit(NO_TOOL, {"opener": SLOT})
    _close_calls(circuit)
    return circuit.save(path)


def _close_calls(circuit: Circuit) -> None:
    circuit.logit(_CLOSE, {"is_name": SURE})
    circuit.logit("arguments", {"close": SURE})
    circuit.logit(_END, {"arguments": SURE})
    circuit.logit("<|eos|>", {"end": SURE})
