"""Measures that were written before places had columns of their own are read with those columns."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from probe.runs.tables import TABLES

WRITTEN = ("layer", "head", "step", "span", "tool", "variant")
COT = [
    ("read_mass", "probability", {"span": "bos", "variant": "answer"}, {"span": "bos", "reader": "answer"}),
    (
        "read_mass",
        "probability",
        {"span": "bos", "step": 2, "layer": 1},
        {"span": "bos", "step": 2, "layer": 1},
    ),
    ("read_logit", "nats", {"span": "bos", "step": 2}, {"unit": "logits", "span": "bos", "step": 2}),
    ("read_origin", "probability", {"span": "model", "step": 1}, {"origin": "model", "step": 1}),
    ("read_origin", "probability", {"span": "model", "variant": "cot"}, {"origin": "model", "kind": "cot"}),
    ("read_distance", "probability", {"variant": "3"}, {"distance": 3}),
    ("memory_lifetime", "steps", {"step": 1, "variant": "share>0.02"}, {"step": 1, "threshold": 0.02}),
    (
        *("knockout_kl", "nats", {"span": "step:1", "variant": "random_total"}),
        {"span": "step:1", "experiment": "total", "control": "random", "reader": "answer"},
    ),
    (
        *("answer_change", "nats", {"span": "step:1", "variant": "direct"}),
        {"span": "step:1", "experiment": "direct"},
    ),
    (
        *("causal_spearman", "rank correlation", {"variant": "read_rate~knockout_kl:deleted"}),
        {"correlate": "read_rate", "cause": "knockout_kl", "experiment": "deleted"},
    ),
    ("early_answer", "nats", {"step": 1}, {"step": 1}),
    ("early_answer", "0 or 1", {"step": 1, "variant": "same"}, {"name": "early_answer_same", "step": 1}),
    ("filler", "share of tasks", {"variant": "score"}, {"name": "filler_score_share"}),
    (
        "resampling",
        "share of draws",
        {"step": 1, "variant": "score"},
        {"name": "resampling_score", "step": 1},
    ),
    ("regenerated", "share", {"variant": "answer"}, {"name": "regenerated_share", "reader": "answer"}),
]
PROMPTING = [
    ("kl", "nats", {"variant": "few"}, {"variant": "few"}),
    ("bias_r2", "R²", {"variant": "few", "span": "sums"}, {"variant": "few", "family": "sums"}),
    (
        *("bias_r2_shuffled", "R²", {"variant": "few"}),
        {"name": "bias_r2_family", "variant": "few", "control": "other_family"},
    ),
    (
        *("bias_promoted", "nats", {"variant": "few", "step": 2, "tool": " Paris"}),
        {"variant": "few", "rank": 2, "token": " Paris"},
    ),
    (
        *("patch_recovery_random", "share of KL", {"variant": "few", "span": "sums", "layer": 1}),
        {"name": "patch_recovery", "variant": "few", "family": "sums", "layer": 1, "control": "random"},
    ),
    (
        *("manifold_alignment_other", "share", {"variant": "few", "layer": 1}),
        {"name": "manifold_alignment", "variant": "few", "layer": 1, "control": "other_family"},
    ),
    (
        *("manifold_angle", "degrees", {"variant": "sums", "span": "seas", "layer": 1}),
        {"family": "seas", "other_family": "sums", "layer": 1},
    ),
    ("accuracy_spread", "share of tasks", {"variant": "template"}, {"wording": "template"}),
]
ABLATED = {"role": "right", "replacement": "zero"}
PROBED = {"role": "right", "state": "decision"}
TOOL = [
    ("head_auroc", "probability", {"variant": "chosen", "layer": 1}, {"role": "chosen", "layer": 1}),
    ("head_auroc_heldout", "probability", {"variant": "chosen"}, {"role": "chosen"}),
    (
        *("head_auroc_heldout", "probability", {"variant": "chosen", "span": "chosen on half 1"}),
        {"role": "chosen", "half": 1},
    ),
    ("head_ablation", "nats", {"variant": "chosen", "span": "right"}, ABLATED | {"heads": "together"}),
    (
        *("head_ablation", "nats", {"variant": "random/mean", "span": "right, chosen on half 0"}),
        {"role": "right", "heads": "random", "replacement": "mean", "half": 0},
    ),
    (
        *("head_ablation", "nats", {"variant": "alone", "span": "right", "layer": 1, "head": 2}),
        ABLATED | {"heads": "alone", "layer": 1, "head": 2},
    ),
    ("head_ablation_rank", "p-value", {"variant": "chosen", "span": "right"}, ABLATED),
    ("head_ablation_accuracy", "share of tasks", {"variant": "base", "span": "right"}, ABLATED),
    (
        "probe_accuracy",
        "share of tasks",
        {"variant": "right", "span": "decision"},
        PROBED | {"rule": "matching"},
    ),
    (
        *("probe_accuracy", "share of tasks", {"variant": "right/class/control", "span": "decision"}),
        PROBED | {"rule": "naming", "control": "labels"},
    ),
]
CASES = [
    (analyzer, *case)
    for analyzer, cases in (("cot", COT), ("prompting", PROMPTING), ("tool", TOOL))
    for case in cases
]


@pytest.mark.parametrize(("analyzer", "name", "unit", "old", "new"), CASES)
def test_labels_of_earlier_versions_are_read_as_columns(tmp_path, analyzer, name, unit, old, new):
    row = {"task_id": "t", "analyzer": analyzer, "name": name, "value": 0.5, "unit": unit, "n": 1}
    types = {"layer": pa.int32(), "head": pa.int32(), "step": pa.int32()}
    columns = {key: pa.array([value]) for key, value in row.items()}
    columns |= {key: pa.array([None], pa.float64()) for key in ("low", "high")}
    columns |= {key: pa.array([old.get(key)], types.get(key, pa.string())) for key in WRITTEN}
    pq.write_table(pa.table(columns), tmp_path / TABLES["measures"].file)
    file = tmp_path / TABLES["measures"].file
    (part,) = TABLES["measures"].decode(file, file.read_bytes())
    (read,) = part.to_pylist()
    assert {key: value for key, value in read.items() if value is not None} == row | new
