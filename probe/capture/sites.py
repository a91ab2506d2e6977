"""The sites of a capture: what each tensor of a passage is called, its axes, its bytes, and how it is read.

One entry of `SITES` is all that a new tensor takes, where the recorder keeps what it is read from. Sizes, defaults, the order of `diff` and the tensors of a run follow from the
list, which is in the order in which a layer computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Sizes(NamedTuple):
    """What the bytes of one passage depend on."""

    model: Any
    """Has n_heads, n_kv_heads, d_model, d_head, d_value and d_vocab."""
    itemsize: int
    """Bytes of one number of the model's dtype."""
    layers: int
    """Layers that are captured."""
    rows: int
    """Positions that are captured."""
    positions: int
    """Positions that are run: all but that of the last token."""
    tokens: int
    steps: int
    """Tokens after the prompt."""
    spans: int
    """Labels of spans, each a column."""
    decisions: int
    parts: int = 0
    """Parts of tools, each a column of the sites that read them."""
    alike: bool = True
    """Whether the heads of the layers that are captured have one shape."""
    attending: int | None = None
    """Layers that are captured and have attention; None: all."""

    @property
    def attention_layers(self) -> int:
        return self.layers if self.attending is None else self.attending


class Reading(Protocol):
    """A finished passage as its sites read it: CPU tensors of the layers that are captured."""

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def rows(self) -> Tensor: ...
    @property
    def decisions(self) -> Tensor: ...
    @property
    def span_means(self) -> Tensor: ...
    @property
    def attention_mass(self) -> Tensor: ...
    @property
    def read_norms(self) -> Tensor: ...
    @property
    def part_mass(self) -> Tensor: ...
    @property
    def part_norms(self) -> Tensor: ...
    @property
    def logits(self) -> Tensor: ...
    @property
    def log_probs(self) -> Tensor: ...

    def by_row(self, state: str) -> Tensor:
        """A recorded state, [layer, row, …]."""
        ...

    def by_head(self, state: str) -> Tensor:
        """A recorded state of heads, [layer, head, row, d_head]."""
        ...

    def cached(self, what: str) -> Tensor:
        """`keys` or `values`, [layer, kv_head, position, d_head]."""
        ...


@dataclass(frozen=True)
class Site:
    """One tensor of a passage."""

    name: str
    axes: tuple[str, ...]
    n_bytes: Callable[[Sizes], int]
    read: Callable[[Reading], Tensor]
    """The tensor, laid out as `axes` say, of a finished passage."""
    needs: frozenset[str] = frozenset()
    """What is kept for it: states that the recorder keeps (`probe.model.attention.RECORDED`), `span_sums` of the prompt's
    residual stream, `read_norms` and `part_norms` beside attention mass."""
    tolerance: str = "relative"
    """How `diff` compares it: a field of `probe.runs.Tolerance`."""
    memory: bool = False
    """Whether it belongs to the model's memory: captured by default only of kinds that generate at length."""

    @property
    def layered(self) -> bool:
        return self.axes[0] == "layer"

    def exists(self, parts: int, alike: bool, attending: int) -> bool:
        """Whether a passage with so many parts of tools has it, of layers whose heads have one shape (`alike`) or not, and of
        which so many have attention."""
        of_heads = attending > 0 or not self.of_attention
        return of_heads and (parts > 0 or not self.of_parts) and (alike or "d_head" not in self.axes)

    @property
    def of_attention(self) -> bool:
        """Whether its layers are those with attention."""
        return is_of_attention(self.axes)

    @property
    def of_parts(self) -> bool:
        """Whether it reads the parts of tools: without any there is no such tensor."""
        return "part" in self.axes


def is_of_attention(axes: Collection[str]) -> bool:
    """Whether a tensor with these axes has the layers with attention alone."""
    return not {"head", "kv_head"}.isdisjoint(axes)


def _span_reads(size: Sizes) -> int:
    return 4 * size.attention_layers * size.model.n_heads * size.rows * size.spans


def _part_reads(size: Sizes) -> int:
    return 4 * size.attention_layers * size.model.n_heads * size.decisions * size.parts


def resid_itemsize(shape: Any, itemsize: int) -> int:
    """Bytes of one number of the residual stream of a model whose dtype has `itemsize`."""
    return 4 if shape.float32_residual else itemsize


def row_bytes(shape: Any, itemsize: int, layers: Sequence[int], wanted: Collection[str]) -> int:
    """Bytes of what is recorded of one position in these layers (`needs_of`); `shape` as of `position_bytes`."""
    of_layers = getattr(shape, "layers", None) or [shape] * shape.n_layers
    streams = len(layers) * sum(name in wanted for name in ("resid", "attn_out", "mlp_out"))
    streams += "embedding" in wanted
    of_heads = 0
    for layer in (of_layers[number] for number in layers):
        values = ("z" in wanted) + ("gate" in wanted and getattr(layer, "gated", False))
        of_heads += layer.n_heads * (layer.d_head * ("queries" in wanted) + layer.d_value * values)
    return streams * shape.d_model * resid_itemsize(shape, itemsize) + of_heads * itemsize


def position_bytes(shape: Any, itemsize: int) -> int:
    """Bytes of the cache of one position, of a model with n_layers, n_kv_heads, d_model, d_head and d_value, and `layers`
    where these may differ: keys and values, and what recurrent layers are given."""
    layers = getattr(shape, "layers", None) or [shape] * shape.n_layers
    inputs = sum(shape.d_model for layer in layers if getattr(layer, "state_bytes", 0))
    return (inputs + sum(layer.n_kv_heads * (layer.d_head + layer.d_value) for layer in layers)) * itemsize


def state_bytes(shape: Any) -> int:
    """Bytes of the states of all recurrent layers behind one position of a sequence."""
    return sum(getattr(layer, "state_bytes", 0) for layer in getattr(shape, "layers", None) or ())


STATES_PER_SEQUENCE = 2
"""States that a sequence in the cache has of a recurrent layer: the one behind its prompt, which lasts, and the newest."""


def sequence_bytes(shape: Any, itemsize: int, length: int, states: int = STATES_PER_SEQUENCE) -> int:
    """Bytes of the cache of a sequence of so many positions; `shape` as of `position_bytes`. What a layer needs while it runs
    is not counted."""
    return position_bytes(shape, itemsize) * length + states * state_bytes(shape)


def _keys(size: Sizes) -> int:
    return size.attention_layers * size.model.n_kv_heads * size.positions * size.model.d_head * size.itemsize


def _values(size: Sizes) -> int:
    return size.attention_layers * size.model.n_kv_heads * size.positions * size.model.d_value * size.itemsize


def _queries(size: Sizes) -> int:
    return size.attention_layers * size.model.n_heads * size.rows * size.model.d_head * size.itemsize


def _z(size: Sizes) -> int:
    return size.attention_layers * size.model.n_heads * size.rows * size.model.d_value * size.itemsize


_HEAD_ROWS = ("layer", "head", "row", "d_head")
_CACHE = ("layer", "kv_head", "position", "d_head")
_SPAN_ROWS = ("layer", "head", "row", "span")
_PART_DECISIONS = ("layer", "head", "decision", "part")

ALWAYS = (
    Site("token_ids", ("position",), lambda size: 8 * size.tokens, lambda passage: passage.token_ids),
    Site("rows", ("row",), lambda size: 8 * size.rows, lambda passage: passage.rows),
    Site("decisions", ("decision",), lambda size: 8 * size.decisions, lambda passage: passage.decisions),
)
"""What every capture has: which tokens, which positions, which decisions."""

_SITES = (
    Site("keys", _CACHE, _keys, lambda passage: passage.cached("keys"), memory=True),
    Site("values", _CACHE, _values, lambda passage: passage.cached("values"), memory=True),
    Site(
        "queries",
        _HEAD_ROWS,
        _queries,
        lambda passage: passage.by_head("queries"),
        frozenset({"queries"}),
        memory=True,
    ),
    Site(
        "attn_to_spans",
        _SPAN_ROWS,
        _span_reads,
        lambda passage: passage.attention_mass,
        frozenset({"queries"}),
        tolerance="probability",
    ),
    Site(
        "value_to_spans",
        _SPAN_ROWS,
        _span_reads,
        lambda passage: passage.read_norms,
        frozenset({"queries", "gate", "read_norms"}),
    ),
    Site(
        "attn_to_parts",
        _PART_DECISIONS,
        _part_reads,
        lambda passage: passage.part_mass,
        frozenset({"queries"}),
        tolerance="probability",
    ),
    Site(
        "value_to_parts",
        _PART_DECISIONS,
        _part_reads,
        lambda passage: passage.part_norms,
        frozenset({"queries", "gate", "part_norms"}),
    ),
    Site("z", _HEAD_ROWS, _z, lambda passage: passage.by_head("z"), frozenset({"z"}), memory=True),
    Site(
        "resid_post",
        ("layer", "row", "d_model"),
        lambda size: size.layers * size.rows * size.model.d_model * resid_itemsize(size.model, size.itemsize),
        lambda passage: passage.by_row("resid"),
        frozenset({"resid"}),
    ),
    Site(
        "resid_span_mean",
        ("layer", "span", "d_model"),
        lambda size: size.layers * size.spans * size.model.d_model * size.itemsize,
        lambda passage: passage.span_means,
        frozenset({"resid", "span_sums"}),
    ),
    Site(
        "logits",
        ("decision", "d_vocab"),
        lambda size: 4 * size.decisions * size.model.d_vocab,
        lambda passage: passage.logits,
    ),
    Site(
        "log_probs",
        ("step",),
        lambda size: 4 * size.steps,
        lambda passage: passage.log_probs,
        tolerance="log_prob",
    ),
)
SITES: dict[str, Site] = {site.name: site for site in _SITES}
"""Sites that may be captured, by name, in the order of the way of the data."""


def axes_of(name: str) -> tuple[str, ...]:
    """The axes of a tensor of a passage."""
    return next(site.axes for site in (*SITES.values(), *ALWAYS) if site.name == name)


def default_sites(memory: bool) -> frozenset[str]:
    """What is captured where nothing is asked for; `memory`: keys, values, queries and head outputs as well."""
    return frozenset(site.name for site in SITES.values() if memory or not site.memory)


def needs_of(sites: Collection[str]) -> frozenset[str]:
    """What is kept for these sites."""
    return frozenset().union(*(SITES[name].needs for name in sites))


def site_bytes(sites: Collection[str], size: Sizes) -> dict[str, int]:
    """Bytes of each tensor of one passage, by name."""
    wanted = [
        site
        for site in SITES.values()
        if site.name in sites and site.exists(size.parts, size.alike, size.attention_layers)
    ]
    return {site.name: site.n_bytes(size) for site in (*wanted, *ALWAYS)}
