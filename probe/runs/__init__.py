"""The run directory: the only module that reads or writes one.

    RUN/run.json                     what was run; `started`, rewritten with the end status
    RUN/task_file.jsonl, catalogue.json, edits.safetensors   what the run was given
    RUN/tasks/ab/<hash of the id>/   record.json, tensors.safetensors, checksums.json; never changed
    RUN/packs/<name>/                the same of many tasks together, in place of their folders (`probe pack`)
    RUN/interventions.parquet, attribution.parquet, patching.parquet, steering.parquet, features.parquet, reasoning.parquet, prompting.parquet,
        measures.parquet, report.html
    RUN/manifest.json                last: every file with its size and checksum
    RUN/.lock                        held by the one process that writes, or by the workers that add tasks
    RUN/.workers/                    which worker is at which chunk, while the run goes on

`RunWriter` writes, `Run` reads, `verify` checks every byte, `diff` compares two runs, `export` makes tables.
Importing this package loads neither torch nor pyarrow.
"""

from probe.runs.diff import TOLERANCES, Difference, Tolerance, diff
from probe.runs.export import FORMATS, export
from probe.runs.files import SCHEMA
from probe.runs.pack import PACK_BYTES, Packing, pack_run, unpack_run
from probe.runs.read import Run, list_runs
from probe.runs.remove import remove_run
from probe.runs.tables import (
    AXES,
    INTERVENTION_FIELDS,
    MEASURE_FIELDS,
    PROMPTING_FIELDS,
    REASONING_FIELDS,
    measure_schema,
)
from probe.runs.task import NotInRun, TaskRun
from probe.runs.tensors import Array
from probe.runs.verify import VerifyReport, verify
from probe.runs.write import RunWriter, default_path, prepare

__all__ = [
    "AXES",
    "FORMATS",
    "INTERVENTION_FIELDS",
    "MEASURE_FIELDS",
    "PACK_BYTES",
    "PROMPTING_FIELDS",
    "REASONING_FIELDS",
    "SCHEMA",
    "TOLERANCES",
    "Array",
    "Difference",
    "NotInRun",
    "Packing",
    "Run",
    "RunWriter",
    "TaskRun",
    "Tolerance",
    "VerifyReport",
    "default_path",
    "diff",
    "export",
    "list_runs",
    "measure_schema",
    "pack_run",
    "prepare",
    "remove_run",
    "unpack_run",
    "verify",
]
