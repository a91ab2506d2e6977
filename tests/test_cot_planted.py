"""Chains whose reads are known, set by hand: pointers that are followed step by step, and induction."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import probe
from probe.analyzers.cot import lens, reads, rewriting
from probe.analyzers.rows import to_table
from probe.experiments import Effort, intervene
from probe.experiments.cot.lens import read_logits
from probe.experiments.cot.rewriting import accepted
from probe.tasks.cot import COT_INSTRUCTION
from tests.circuit import Circuit

NODES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
N_STEPS = len(NODES) - 1
SURE = 30.0
RECENT = 4e4


@pytest.fixture(scope="module")
def chase(tmp_path_factory):
    """Follows pointers: `bee ANT` in the question says that ant points to bee, and each step "go NODE" names where
    the last step's node points to. The row of "go" reads the latest node (layer 0) and looks up its pointer
    (layer 1): nothing else leads from step to step."""
    folder = tmp_path_factory.mktemp("chase")
    embed = {node: {f"node:{node}": 1.0, "is_node": 1.0} for node in NODES}
    embed |= {node.upper(): {f"src:{node}": 1.0, "is_src": 1.0} for node in NODES}
    embed |= {"go": {"is_go": 1.0}, "\n": {"line": 1.0}, ":": {"cue": 1.0}, "<|bos|>": {"is_bos": 1.0}}
    embed |= {"start": {"is_start": 1.0}}
    features = [f"{group}:{node}" for group in ("near", "out") for node in NODES]
    pairs = list(zip(NODES, NODES[1:], strict=False))
    pairs = [pairs[i] for i in (3, 0, 5, 1, 4, 2)]
    question = " ".join(f"{after} {node.upper()}" for node, after in pairs) + f" start {NODES[0]}"
    texts = [question, "go", COT_INSTRUCTION, "Answer : User Assistant", "\n"]
    circuit = Circuit(embed, features, texts, n_heads=8)
    latest = {"1": {"is_node": 2 * RECENT, "position": RECENT}}
    near = [(f"node:{node}", f"near:{node}", 1.0) for node in NODES]
    circuit.head(0, 0, latest, near)
    follow = {f"near:{node}": {f"src:{node}": 80.0} for node in NODES}
    sink = {"1": {"is_bos": 40.0}}
    # A row that is no "go" looks at the sink, which holds no pointer.
    look = {
        **follow,
        **sink,
        "line": {"is_bos": 200.0},
        "is_node": {"is_bos": 200.0},
        "cue": {"is_bos": 200.0},
    }
    circuit.head(1, 0, look, [(f"near:{node}", f"out:{node}", 1.0) for node in NODES])
    for node in NODES:
        # The spaced form is the one that stands behind "go".
        circuit.logit(f" {node}", {f"out:{node}": 8.0})
    circuit.logit("\n", {"is_node": SURE})
    circuit.logit("go", {"line": SURE})
    circuit.save(folder / "model")
    steps = [f"go {node}" for node in NODES[1:]]
    task = {"id": "chase", "kind": "cot", "question": question, "answer": NODES[-1], "steps": steps}
    (folder / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    model = probe.load(str(folder / "model"))
    run = probe.run(
        folder / "tasks.jsonl", model=model, out=folder / "run", reasoning="reference", analyze=False,
        max_new_tokens=3 * N_STEPS + 2,
    )  # fmt: skip
    intervene(
        run, ["knockouts", "read_logit", "regenerated", "resampling"], model=model, effort=Effort(draws=3)
    )
    return run, model


def test_the_read_matrix_shows_the_chain(chase):
    run, _ = chase
    task = run["chase"]
    spans = {span["label"]: span for span in task.record["spans"]}
    assert [f"step:{k}" in spans for k in range(1, N_STEPS + 1)] == [True] * N_STEPS
    head = reads.step_reads(task, layer=0, head=0)
    row = {label: i for i, label in enumerate(head.readers)}
    mass = task["attn_to_spans"][0, 0]
    labels, at = task.labels(), {int(p): i for i, p in enumerate(task["rows"])}
    for k in range(2, N_STEPS + 1):
        # The row of "go" emits the node and reads the step before and nothing else.
        emitting = at[spans[f"step:{k}"]["start"]]
        assert float(mass[emitting, labels.index(f"step:{k - 1}")]) > 0.99
        part = head.values[0, row[f"step:{k}"]]
        steps = {j: part[head.labels.index(f"step:{j}")] for j in range(1, k)}
        assert max(steps, key=steps.__getitem__) == k - 1
        assert all(steps[j] < 1e-3 for j in range(1, k - 1))


def test_hiding_a_step_breaks_the_next_alone_under_teacher_forcing(chase):
    run, _ = chase
    frame = run.table("reasoning")
    total = frame[frame.experiment == "total"].set_index(["source", "reader"]).kl
    for k in range(1, N_STEPS):
        assert total[f"step:{k}", f"step:{k + 1}"] > 1, k
        for later in range(k + 2, N_STEPS + 1):
            assert total[f"step:{k}", f"step:{later}"] < 1e-4, (k, later)


def test_hiding_a_step_breaks_all_that_is_written_after_it(chase):
    run, _ = chase
    frame = run.table("reasoning")
    rows = frame[frame.experiment == "regenerated"]
    by_reader = rows[rows.reader != "answer"].set_index(["source", "reader"])
    for k in range(1, N_STEPS):
        for later in range(k + 1, N_STEPS + 1):
            assert by_reader.same[f"step:{k}", f"step:{later}"] == 0, (k, later)
            # The pointer before the hidden one is followed again: all nodes come one step late.
            assert by_reader.said[f"step:{k}", f"step:{later}"] == f"go {NODES[later - 1]}"
    table = to_table(rewriting.measures(run)).to_pandas()
    selected = table[(table.name == "regenerated") & (table.task_id == "chase") & (table.span == "step:2")]
    assert selected[selected.step == 3].value.tolist() == [0.0]


def test_a_sure_model_draws_the_same_steps_so_no_draw_counts_against_them(chase):
    run, _ = chase
    rows = run.table("reasoning")
    rows = rows[rows.experiment == "resampling"]
    assert len(rows) == 3 * (N_STEPS + 1)
    assert set(rows.kept) == set(range(N_STEPS + 1))
    assert (rows.value[rows.kept < N_STEPS] == 0).mean() > 0.8


def test_the_pointers_logit_comes_from_the_question_and_the_nodes_own_from_the_step(chase):
    run, model = chase
    layers, rows, labels, logits = read_logits(run["chase"], model)
    assert layers == [0, 1]
    spans = {span["label"]: span for span in run["chase"].record["spans"]}
    go = rows.index(spans["step:3"]["start"])
    assert float(logits[1, go, labels.index("question")]) == pytest.approx(8.0, abs=0.1)
    # What is near is the last node, whose token is not the one emitted: it brings nothing to that logit.
    assert float(logits[0, go, labels.index("step:2")]) == pytest.approx(0.0, abs=1e-2)
    frame = to_table(lens.measures(run)).to_pandas()
    assert not frame[(frame.name == "read_logit") & (frame.span == "question")].empty


WORDS = ("one", "two", "red", "sky", "owl", "pen", "cup", "hat")


@pytest.fixture(scope="module")
def induction(tmp_path_factory):
    """Repeats: a row reads the token behind the earlier occurrence of its own word (previous-token head, then
    induction head)."""
    folder = tmp_path_factory.mktemp("induction")
    embed = {word: {f"word:{word}": 1.0, "is_word": 1.0} for word in WORDS} | {"<|bos|>": {"is_bos": 1.0}}
    n_at = 40
    features = [f"{group}:{word}" for group in ("prev", "out") for word in WORDS]
    features += [f"at:{p}" for p in range(n_at)]
    circuit = Circuit(embed, features, [" ".join(WORDS) + " ."], n_heads=4, d_head=48)
    import torch

    with torch.no_grad():
        for p in range(n_at):
            circuit._hf.transformer.wpe.weight[p] = circuit._written({f"at:{p}": 1.0})
    previous = {f"at:{p}": {f"at:{p - 1}": 80.0} for p in range(1, n_at)}
    circuit.head(0, 0, previous, [(f"word:{w}", f"prev:{w}", 1.0) for w in WORDS])
    match = {f"word:{w}": {f"prev:{w}": 80.0} for w in WORDS} | {"1": {"is_bos": 20.0}}
    circuit.head(1, 0, match, [(f"word:{w}", f"out:{w}", 1.0) for w in WORDS])
    for word in WORDS:
        circuit.logit(word, {f"out:{word}": 8.0})
    circuit.save(folder)
    return circuit, probe.load(str(folder))


def test_an_induction_model_reads_the_token_behind_the_earlier_one(induction):
    from probe.experiments.cot.knockouts import chain_rows
    from tests.slow import slow_attention
    from tests.test_cot_knockouts import Chain, record

    circuit, model = induction
    first, second = WORDS[:4], WORDS[4:]
    words = ["<|bos|>", ".", *first, ".", *second, ".", *first]
    ids = [circuit.tokens[word] for word in words]
    bounds = {"question": (1, 2), "step:1": (2, 7), "step:2": (7, 12), "step:3": (12, 16)}
    alpha = slow_attention(model.hf, ids)[1, 0]
    for row in range(12, 15):
        assert int(alpha[row].argmax()) == row - 12 + 3
    rows, _ = chain_rows(Chain(record(ids, bounds)), ("knockouts",), model)
    kl = {(r["experiment"], r.get("source"), r["reader"]): r.get("kl") for r in rows}
    sure = 8.0 - math.log(math.exp(8.0) + len(circuit.tokens) - 1)
    gone = -math.log(len(circuit.tokens))
    assert kl["total", "step:1", "step:3"] > 0.5 * math.exp(sure) * (sure - gone) / 2
    assert kl["total", "step:2", "step:3"] == pytest.approx(0, abs=1e-4)


def test_other_words_must_keep_the_numbers():
    assert accepted("Tom has 3 apples.\n", "There are 3 apples with Tom.") == "There are 3 apples with Tom.\n"
    assert accepted("Tom has 3 apples.\n", "Tom has some apples.") is None
    assert accepted("Tom has 3 apples.\n", "tom has 3 apples") is None
    assert accepted("Tom has 3 apples.\n", "") is None


def test_a_difference_of_shares_has_newcombes_interval():
    from probe.maths.intervals import share_difference

    # Newcombe 1998, table II, case (a), method 10.
    low, high = share_difference(56 / 70, 70, 48 / 80, 80)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)
    assert np.isclose(sum(share_difference(0.5, 10, 0.5, 10)), 0)
