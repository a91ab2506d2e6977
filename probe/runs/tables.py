"""The tables of a run: what one row of measures or of interventions holds, and how a table is read and written."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from probe.runs.files import (
    ATTRIBUTION,
    FEATURES,
    INTERVENTIONS,
    MEASURES,
    PATCHING,
    PROMPTING,
    REASONING,
    STEERING,
    FileFault,
)
from probe.runs.migrate import migrated

if TYPE_CHECKING:
    import pyarrow

AXES: dict[str, tuple[str, str]] = {
    "layer": ("int32", "layer, 0 … n_layers − 1; of a window of layers the first"),
    "layer_to": ("int32", "last layer of a window of layers"),
    "head": ("int32", "attention head"),
    "step": (
        "int32",
        "step of a reasoning (of a matrix: the step that reads), turn of an agent, message of a conversation",
    ),
    "reader": ("string", "what reads where it is no step: `answer`"),
    "span": (
        "string",
        "labelled span that is read or acted upon; `no_tool` where the candidate calls no tool",
    ),
    "tool": ("string", "tool by name"),
    "other_tool": ("string", "the second tool of a pair: a partner in an exchange, what was chosen instead"),
    "variant": ("string", "variant of a prompting task, as named in the task file"),
    "role": (
        "string",
        "which tool or pair is meant: `chosen`, `right`, `other`, `first_two`, `chosen_right`, `drawn`; of two prompts what they differ in: "
        "`request`, `description`, `system`, `tasks`",
    ),
    "component": (
        "string",
        "what adds to the residual stream, or to the logits: `embedding`, `attention`, `mlp`, a bias, `normalizer`",
    ),
    "kind": ("string", "kind of task"),
    "experiment": ("string", "what was changed, as named in the tables of experiments"),
    "correlate": ("string", "the measure that is correlated"),
    "cause": ("string", "the effect that it is correlated with"),
    "control": (
        "string",
        "what stands in for the real thing: `random`, `labels`, `other_family`, `other_task`",
    ),
    "scorer": ("string", "rule that scores candidates"),
    "rule": ("string", "rule that truncates, fits or compares"),
    "temperature": ("float64", "temperature τ"),
    "k": ("int32", "number of tokens that top-k keeps"),
    "p": ("float64", "mass that top-p keeps"),
    "wanted_entropy": ("float64", "entropy, nats, whose temperature is looked for"),
    "energy": ("float64", "energy of a token, logits: the middle of a bin"),
    "gauge": ("string", "zero of energy: `raw` or `centred`"),
    "slot": ("int32", "place in the list of shown tools, from 1"),
    "n_tools": ("int32", "number of shown tools"),
    "bin": ("int32", "bin of a histogram, from 0"),
    "binning": ("string", "how values are sorted into bins: `width` or `mass` of all bins is equal"),
    "fold": ("int32", "fold of a cross-validation, from 0"),
    "site": (
        "string",
        "which states are replaced: `resid_post` behind a block, `attn_out` and `mlp_out` that its parts add, `z` of heads",
    ),
    "mode": (
        "string",
        "which way states are patched: `denoise`, those of the clean prompt into the corrupt one; `noise`, the reverse",
    ),
    "direction": ("string", "vector that is added: `mean_difference`, `unembedding`, `probe`, `random`"),
    "status": ("string", "what became of a pair of prompts"),
    "n_heads": ("int32", "number of heads that are replaced together"),
    "dose": ("float64", "length of an added vector, in mean lengths of the states of its layer"),
    "half": ("int32", "half of the tasks on which something was chosen, 0 or 1"),
    "heads": ("string", "which heads are ablated: `together`, `alone`, `random`"),
    "feature": ("int32", "feature of a sparse autoencoder, from 0"),
    "features": (
        "string",
        "which features are set to zero: `top` of the chosen tool, `random` as active, `none`",
    ),
    "replacement": (
        "string",
        "what stands in place of an ablated output: `zero`, `mean`; of a state the autoencoder's `reconstruction`, or the `state` "
        "less what the features write",
    ),
    "state": (
        "string",
        "hidden state that is read: `decision`, `request`, `rows` for all that were captured",
    ),
    "signal": ("string", "what is there before a call runs, as docs/tool-use.md lists"),
    "coverage": ("float64", "share of the choices that is accepted"),
    "intentions": (
        "string",
        "how intentions were had: `drawn`, `enumerated`; `random` and `other_task` are controls",
    ),
    "family": ("string", "family of prompting tasks"),
    "other_family": ("string", "the second family of a pair"),
    "wording": ("string", "variants that say the same: what their names share, up to the last full stop"),
    "rank": ("int32", "place in a list by size, from 1"),
    "token": ("string", "text of a token"),
    "word": ("string", "word that was hidden, of a tool's description"),
    "word_index": ("int32", "place of the word in its text, from 0"),
    "distance": ("int32", "steps between reader and source"),
    "threshold": ("float64", "share of attention that counts as a read"),
    "origin": ("string", "who wrote what is read: `prompt`, `model`, `environment`, `sink`, `markup`"),
    "module": ("string", "weight matrix, by its path within a layer; of a score its side, `query` or `key`"),
    "writer": ("int32", "layer that wrote what is read"),
    "part": (
        "string",
        "part of a tool's definition: `name`, `description`, `parameters`; null where it is the whole",
    ),
}
"""Places at which a measure may be taken: column → (type, meaning). Null where it does not apply."""

MEASURE_FIELDS = {
    "task_id": "string",
    "analyzer": "string",
    "name": "string",
    "value": "float64",
    "unit": "string",
    "low": "float64?",
    "high": "float64?",
    "n": "int64",
    **{axis: f"{kind}?" for axis, (kind, _) in AXES.items()},
}
"""Columns in order and their types; `?` marks those that are null where they do not apply."""

INTERVENTION_FIELDS = {
    "task_id": "string",
    "experiment": "string",
    "condition": "int32",
    "subject": "string?",
    "other": "string?",
    "detail": "string?",
    "layer_from": "int32?",
    "layer_to": "int32?",
    "n_tokens": "int32?",
    "weight": "float64?",
    "tool": "string?",
    "log_prob": "float64",
    "part": "string?",
}
"""One row a scored candidate of a condition; `probe.experiments` says what each column holds."""

REASONING_FIELDS = {
    "task_id": "string",
    "experiment": "string",
    "source": "string?",
    "start": "int32?",
    "n_tokens": "int32?",
    "kept": "int32?",
    "reader": "string",
    "n_rows": "int32",
    "kl": "float64?",
    "log_prob": "float64?",
    "said": "string?",
    "same": "float64?",
    "score": "float64?",
    "layer": "int32?",
    "value": "float64?",
}
"""One row a reader of a changed reasoning; `probe.experiments.cot.reasoning` says what each column holds."""

PROMPTING_FIELDS = {
    "task_id": "string",
    "experiment": "string",
    "variant": "string",
    "layer": "int32?",
    "head": "int32?",
    "kl": "float64?",
    "kl_reverse": "float64?",
    "kl_start": "float64?",
    "js": "float64?",
    "tv": "float64?",
    "entropy": "float64?",
    "token": "int32?",
    "target_rank": "int32?",
    "target_log_prob": "float64?",
    "text": "string?",
}
"""One row a distribution at a layer; `probe.experiments.prompting.loop` says what each column holds."""

ATTRIBUTION_FIELDS = {
    "task_id": "string",
    "experiment": "string",
    "pair": "string",
    "tool": "string?",
    "other": "string?",
    "part": "string",
    "layer": "int32?",
    "head": "int32?",
    "source": "string?",
    "label": "string?",
    "start": "int32?",
    "word": "string?",
    "word_index": "int32?",
    "writer": "int32?",
    "value": "float64",
}
"""One row a summand of the log-odds of two names; `probe.experiments.tool.attribution` says what each column holds."""

PATCHING_FIELDS = {
    "task_id": "string",
    "experiment": "string",
    "pair": "string",
    "partner": "string?",
    "tool": "string?",
    "other": "string?",
    "status": "string?",
    "clean": "float64?",
    "corrupt": "float64?",
    "mode": "string?",
    "donor": "string?",
    "site": "string?",
    "span": "string?",
    "aligned": "string?",
    "layer": "int32?",
    "head": "int32?",
    "heads": "string?",
    "n_heads": "int32?",
    "half": "int32?",
    "value": "float64?",
    "linear": "float64?",
}
"""One row a pair of prompts, and one a patch of it; `probe.experiments.tool.patching` says what each column holds."""

STEERING_FIELDS = {
    "task_id": "string",
    "half": "int32?",
    "part": "string",
    "role": "string?",
    "tool": "string?",
    "other": "string?",
    "direction": "string",
    "layer": "int32",
    "dose": "float64",
    "before": "float64?",
    "value": "float64",
    "log_prob": "float64?",
}
"""One row a number of a steered choice; `probe.experiments.tool.steering` says what each column holds."""

FEATURES_FIELDS = {
    "task_id": "string",
    "layer": "int32",
    "part": "string",
    "state": "string?",
    "feature": "int32?",
    "features": "string?",
    "replacement": "string?",
    "tool": "string?",
    "half": "int32?",
    "n": "int32?",
    "before": "float64?",
    "value": "float64",
    "log_prob": "float64?",
}
"""One row a number of a sparse autoencoder on the run's states; `probe.experiments.tool.features` says what each column holds."""


@dataclass(frozen=True)
class Table:
    """A kind of table: its file in the run directory and its columns."""

    name: str
    file: str
    fields: dict[str, str]

    def schema(self) -> pyarrow.Schema:
        import pyarrow as pa

        kinds = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64(), "int32": pa.int32()}
        return pa.schema(
            [
                pa.field(name, kinds[kind.rstrip("?")], kind.endswith("?"))
                for name, kind in self.fields.items()
            ]
        )

    def encode(self, parts: pyarrow.Table | Iterable[pyarrow.Table]) -> bytes:
        """Parquet bytes of a table with these columns in any order, or of the parts of one, a row group each.

        No more than a part is held beside the bytes. Raises ValueError when a column is missing or unknown, does not
        convert, or is null where it may not be.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts = iter([parts] if isinstance(parts, pa.Table) else parts)
        first = self._checked(next(parts, self.schema().empty_table()))
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, first.schema, compression="zstd") as writer:
            writer.write_table(first)
            for part in parts:
                writer.write_table(self._checked(part))
        return sink.getvalue()

    def _checked(self, table: pyarrow.Table) -> pyarrow.Table:
        import pyarrow as pa

        if sorted(table.column_names) != sorted(self.fields):
            differ = set(table.column_names) ^ set(self.fields)
            raise ValueError(
                f"{self.name} need exactly the columns {list(self.fields)}; check {sorted(differ)}"
            )
        table = table.select(list(self.fields))
        for name, kind in self.fields.items():
            if not kind.endswith("?") and table[name].null_count:
                raise ValueError(f"{self.name}: {table[name].null_count} rows have no {name}")
        try:
            return table.cast(self.schema().with_metadata(table.schema.metadata))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.name}: {error}") from error

    def decode(self, path: Path, data: bytes) -> Iterator[pyarrow.Table]:
        """The table in the bytes of the file `path`, a row group at a time, at least one. Raises a Fault when they are
        none."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(io.BytesIO(data))
            for number in range(file.num_row_groups):
                yield self._current(file.read_row_group(number))
            if not file.num_row_groups:
                yield self._current(file.schema_arrow.empty_table())
        except (pa.ArrowException, OSError, ValueError) as error:
            raise FileFault(path, "altered", f"not a table of {self.name}: {error}"[:200]) from error

    def _current(self, table: pyarrow.Table) -> pyarrow.Table:
        """Rows as this version writes them: a table of an earlier one has fewer columns."""
        import pyarrow as pa

        earlier = "role" not in table.column_names
        table = self._renamed(table)
        for field in self.schema():
            if field.nullable and field.name not in table.column_names:
                table = table.append_column(field, pa.nulls(len(table), field.type))
        table = table.select(list(self.fields))
        table = table.cast(self.schema().with_metadata(table.schema.metadata))
        return migrated(table) if earlier and self.name == "measures" else table

    def _renamed(self, table: pyarrow.Table) -> pyarrow.Table:
        """`direction` of a patch has become `mode`: that of a vector is another."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if "mode" in table.column_names or "direction" not in table.column_names:
            return table
        if self.name == "patches":
            names = ["mode" if name == "direction" else name for name in table.column_names]
            return table.rename_columns(names)
        if self.name != "measures":
            return table
        labels = table["direction"]
        of_patch = pc.is_in(labels, pa.array(["denoise", "noise"]))
        nothing = pa.scalar(None, labels.type)
        place = table.column_names.index("direction")
        vectors = table.set_column(place, "direction", pc.if_else(of_patch, nothing, labels))
        return vectors.append_column("mode", pc.if_else(of_patch, labels, nothing))


TableName = Literal[
    "measures",
    "interventions",
    "attribution",
    "patching",
    "steering",
    "features",
    "reasoning",
    "prompting",
]
TABLES: dict[str, Table] = {
    "measures": Table("measures", MEASURES, MEASURE_FIELDS),
    "interventions": Table("interventions", INTERVENTIONS, INTERVENTION_FIELDS),
    "attribution": Table("attributions", ATTRIBUTION, ATTRIBUTION_FIELDS),
    "patching": Table("patches", PATCHING, PATCHING_FIELDS),
    "steering": Table("steered choices", STEERING, STEERING_FIELDS),
    "features": Table("features", FEATURES, FEATURES_FIELDS),
    "reasoning": Table("changed reasoning", REASONING, REASONING_FIELDS),
    "prompting": Table("prompting experiments", PROMPTING, PROMPTING_FIELDS),
}
"""Tables that a run may have beside its tasks: scores of tool tasks under changed prompts, masks and heads
(`interventions`), the log-odds of two tools by what writes them (`attribution`), and what of them comes over with the states of
another prompt (`patching`), choices that a vector turns (`steering`), features of a sparse autoencoder
(`features`); chains of thought with parts hidden, deleted or replaced (`reasoning`); output distributions of
prompting tasks by layer, read out or patched (`prompting`); and the measures that are made of all of them."""


def measure_schema() -> pyarrow.Schema:
    """The Arrow schema of measures.parquet."""
    return TABLES["measures"].schema()
