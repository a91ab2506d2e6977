"""`probe distribution` against transformers and scipy: a run's decisions, a prompt's positions, texts, figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from scipy import special, stats
from transformers.generation import logits_process as theirs

import probe
from probe.analyzers import analyze
from probe.cli import main
from probe.distribution.source import each_position
from probe.report import write_report
from probe.report.data import collect
from probe.runs import Run
from tests.browser import browser, dom_of
from tests.defined import check_defined

MODEL = "random:tiny-llama"
TASKS = [
    {"id": "c1", "kind": "cot", "question": "2 + 2?", "answer": 4},
    {"id": "c2", "kind": "cot", "question": "What is 3 * 3, and why?", "answer": 9},
    {
        "id": "p1",
        "kind": "prompting",
        "input": "hot ->",
        "variants": [{"name": "opposite", "prefix": "Opposite: "}],
    },
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("distribution")
    tasks = path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    fresh = probe.run(
        tasks, model=MODEL, out=path / "run", temperature=0.9, top_p=0.8, top_k=50, max_new_tokens=4
    )
    return Path(fresh.path)


def call(*arguments: object, code: int = 0):
    result = CliRunner().invoke(main, ["distribution", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def document(*arguments: object) -> dict:
    return json.loads(call(*arguments, "--json").stdout)


def plain_logits(text: str) -> tuple[list[int], torch.Tensor]:
    """All positions of a text, by transformers alone, after the sink token that probe puts in front."""
    model = probe.load(MODEL)
    ids = model.codec.encode(text)
    ids = [model.codec.sink, *ids]
    with torch.no_grad():
        return ids, model.hf(torch.tensor([ids])).logits[0]


def test_without_a_place_it_is_the_first_decision_of_a_run(run):
    printed = document(run)
    z = Run(run)["c1"]["logits"][0]
    p = special.softmax(z.double().numpy())
    assert printed["source"]["task_id"] == "c1" and printed["source"]["decision"] == 0
    assert printed["d_vocab"] == len(p)
    assert printed["top"][0]["probability"] == pytest.approx(p.max(), abs=1e-12)
    plain = next(row for row in printed["temperature"] if row["tau"] == 1)
    assert plain["entropy"] == pytest.approx(stats.entropy(p), abs=1e-10)
    assert plain["raw"]["log_partition"] == pytest.approx(special.logsumexp(z.double().numpy()), abs=1e-10)
    for row in printed["temperature"]:
        q = special.softmax(z.double().numpy() / row["tau"])
        assert row["kl"] == pytest.approx(special.rel_entr(q, p).sum(), abs=1e-10)
        assert row["top1"] == pytest.approx(q.max(), abs=1e-12)
        assert row["identity_error"] < 1e-10 * max(1, abs(row["raw"]["free_energy"]))
        assert row["difference_error"] < 1e-5 * max(1, row["heat_capacity"])


def test_any_temperature_rule_and_wanted_entropy_can_be_asked_for(run):
    printed = document(
        run, "--task", "c2", "--temperature", 0.7, "--entropy", 2.5, "--top-p", 0.9, "--min-p", 0.3
    )
    z = Run(run)["c2"]["logits"][0]
    assert [row["tau"] for row in printed["temperature"]] == [0.7]
    tau = printed["wanted"][0]["tau"]
    assert stats.entropy(special.softmax(z.double().numpy() / tau)) == pytest.approx(2.5, abs=1e-8)
    rules = {(row["rule"], row["number"]): row for row in printed["truncation"]}
    assert set(rules) == {("top-p", 0.9), ("min-p", 0.3)}
    kept = theirs.TopPLogitsWarper(0.9)(torch.zeros(1, 1), z[None] / 0.7)[0]
    assert rules["top-p", 0.9]["size"] == int((kept > -math.inf).sum())
    assert rules["top-p", 0.9]["kl"] == pytest.approx(-math.log(rules["top-p", 0.9]["mass"]), abs=1e-12)
    grid = document(run, "--temperature", "0.1:10:5")["temperature"]
    assert [row["tau"] for row in grid] == pytest.approx(np.geomspace(0.1, 10, 5))


def test_the_row_of_a_decision_is_that_decision(run):
    kept, again = document(run, "--task", "c1"), document(run, "--task", "c1", "--row", 0)
    assert kept["source"]["position"] == again["source"]["position"]
    assert kept["token"]["token"] == again["token"]["token"]
    for a, b in zip(kept["temperature"], again["temperature"], strict=True):
        assert a["entropy"] == pytest.approx(b["entropy"], abs=1e-4)


def test_a_prompt_is_looked_at_where_it_ends_or_at_any_position():
    ids, logits = plain_logits("hello there")
    for row, more in ((-1, ()), (3, ("--row", 3))):
        printed = document("--prompt", "hello there", "--model", MODEL, *more)
        p = special.softmax(logits[row].double().numpy())
        assert printed["top"][0]["token"] == int(p.argmax())
        assert printed["top"][0]["probability"] == pytest.approx(p.max(), abs=1e-6)
        assert (printed["token"] or {}).get("token") == (ids[row + 1] if row >= 0 else None)


def test_positions_of_a_text_are_those_of_transformers_on_every_architecture(tiny_model):
    text = "What is 3 * 3, and why?"
    distributions = list(each_position(tiny_model, tiny_model.codec, text, "a"))
    ids = [tiny_model.codec.sink, *tiny_model.codec.encode(text)]
    with torch.no_grad():
        expected = tiny_model.hf(torch.tensor([ids])).logits[0].float()
    torch.testing.assert_close(
        torch.stack([distribution.logits for distribution in distributions]), expected, rtol=1e-4, atol=1e-4
    )
    assert [distribution.token for distribution in distributions] == [*ids[1:], None]


def test_a_student_is_distilled_from_the_prompts_distribution():
    printed = document(
        "--prompt", "hello", "--model", MODEL, "--student", "random:tiny-neox", "--temperature", "1,4"
    )
    student = probe.load("random:tiny-neox")
    _, teacher = plain_logits("hello")
    with torch.no_grad():
        ids = torch.tensor([[student.codec.sink, *student.codec.encode("hello")]])
        z = student.hf(ids).logits[0, -1].double()
    for row in printed["distillation"]["by_tau"]:
        p, q = ((x.double() / row["tau"]).softmax(-1).numpy() for x in (teacher[-1], z))
        assert row["kl"] == pytest.approx(stats.entropy(p, q), abs=1e-5)
        assert row["gradient_error"] < 1e-12


def test_every_position_of_a_prompt_has_its_nucleus():
    _, logits = plain_logits("hello there")
    printed = document("--prompt", "hello there", "--model", MODEL, "--all", "--top-p", 0.9, "--top-k", 20)
    kept = theirs.TopPLogitsWarper(0.9)(torch.zeros(len(logits), 1), logits)
    sizes = [
        next(k for k in row["truncation"] if k["rule"] == "top-p")["size"] for row in printed["decisions"]
    ]
    assert sizes == (kept > -math.inf).sum(-1).tolist()
    assert {row["k"] for row in printed["fixed_k"]} == {20}
    share = np.mean([size > 20 for size in sizes])
    assert printed["fixed_k"][0]["too_small"]["value"] == pytest.approx(share)


def test_all_decisions_of_a_run_are_surveyed(run):
    printed = document(run, "--all")
    runs = Run(run)
    expected = [
        runs[name][f"{v}logits"] for name, v in (("c1", ""), ("c2", ""), ("p1", "base/"), ("p1", "opposite/"))
    ]
    rows = torch.cat(expected)
    assert len(printed["decisions"]) == len(rows)
    entropies = stats.entropy(special.softmax(rows.double().numpy(), axis=-1), axis=-1)
    assert sorted(row["entropy"] for row in printed["decisions"]) == pytest.approx(
        sorted(entropies), abs=1e-9
    )


def test_the_gap_in_loss_is_the_gap_in_energy_minus_that_in_free_energy(tmp_path):
    base, other = tmp_path / "own.txt", tmp_path / "other.jsonl"
    base.write_text("hello there\nand more\n\nof it\n")
    other.write_text(json.dumps({"text": "zzzz ##"}) + "\n" + json.dumps({"text": "?! 17 q"}) + "\n")
    for tau in (1, 0.5):
        printed = document("--texts", base, "--against", other, "--model", MODEL, "--temperature", tau)
        losses = []
        for text in ("hello there", "and more", "of it"):
            ids, logits = plain_logits(text)
            losses += torch.nn.functional.cross_entropy(
                logits[:-1].double() / tau, torch.tensor(ids[1:]), reduction="none"
            ).tolist()
        rows = printed["texts"][0]["rows"]
        assert [row["cross_entropy"] for row in rows] == pytest.approx(losses, abs=1e-5)
        assert printed["texts"][0]["cross_entropy"]["value"] == pytest.approx(np.mean(losses), abs=1e-5)
        gap = {name: entry["value"] for name, entry in printed["gap"].items()}
        assert gap["cross_entropy"] == pytest.approx((gap["energy"] - gap["free_energy"]) / tau, abs=1e-10)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_figures_are_written(run, tmp_path, kind):
    texts = tmp_path / "a.txt"
    texts.write_text("one text\nand another\n")
    start = b"\x89PNG" if kind == "png" else b"<?xml"
    for name, arguments in (
        ("one", [run]),
        ("all", [run, "--all"]),
        ("gap", ["--texts", texts, "--model", MODEL]),
    ):
        path = tmp_path / f"{name}.{kind}"
        assert str(path) in call(*arguments, "--plot", path).stdout
        assert path.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say what to look at"),
        (["RUN", "--prompt", "x"], "one of"),
        (["RUN", "--task", "c9"], "no task 'c9'"),
        (["RUN", "--decision", "7"], "counted from 0"),
        (["RUN", "--row", "99"], "counted from 0"),
        (["RUN", "--passage", "none"], "there is main"),
        (["RUN", "--temperature", "0"], "argmax"),
        (["RUN", "--temperature", "5:1:3"], "LOW:HIGH:COUNT"),
        (["RUN", "--top-p", "1.5"], "in (0, 1]"),
        (["RUN", "--entropy", "40"], "no temperature has an entropy of 40"),
        (["RUN", "--entropy", "-1"], "positive"),
        (["RUN", "--plot", "x.pdf"], ".png or .svg"),
        (["--prompt", "", "--model", MODEL], "empty"),
        (["--against", "x", "--prompt", "y"], "give both"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_to_do(run, arguments, says):
    named = [str(run) if word == "RUN" else word for word in arguments]
    assert says in call(*named, code=2).stderr


def test_a_run_that_kept_no_logits_says_how_to_have_them(tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(TASKS[0]) + "\n")
    fresh = probe.run(tasks, model=MODEL, out=tmp_path / "run", capture="resid_post", max_new_tokens=2)
    assert "--capture default" in call(fresh.path, code=2).stderr
    assert document(fresh.path, "--task", "c1", "--row", 1)["source"]["row"] == 1
    measured = Run(fresh.path).measures().query("analyzer == 'distribution'")
    assert set(measured.name) <= {"repetition", "distinct_pairs"}, "of the text alone"


def test_texts_that_cannot_be_read_are_refused_by_their_line(tmp_path):
    wrong = tmp_path / "a.jsonl"
    wrong.write_text('{"text": "fine"}\n\n{"txt": "no"}\n')
    assert f"{wrong}:3:1: text" in call("--texts", wrong, "--model", MODEL, code=3).stderr
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert "one text a line" in call("--texts", empty, "--model", MODEL, code=3).stderr
    assert "cannot be read" in call("--texts", tmp_path / "none.txt", "--model", MODEL, code=3).stderr


def test_plain_lines_say_the_numbers_of_the_document(run, tmp_path):
    text = call(run, "--entropy", 2).stdout
    printed = document(run, "--entropy", 2)
    assert f"entropy 2 nats at τ = {printed['wanted'][0]['tau']:.6g}" in text
    assert f"{printed['truncation'][1]['size']:,d}" in text
    assert "rank correlation" in call(run, "--all").stdout
    texts = tmp_path / "a.txt"
    texts.write_text("one text\n")
    assert "(E−F)/τ" in call("--texts", texts, "--model", MODEL).stdout


# -- the analyzer ----------------------------------------------------------------------------------------------


def test_the_measures_of_a_decision_are_scipys(run):
    frame = Run(run).measures()
    rows = frame[(frame.analyzer == "distribution") & (frame.task_id == "c1") & (frame.step == 0)]
    by_name = {}
    for row in rows[rows.rule.isna()].to_dict("records"):
        label = next((row[axis] for axis in ("gauge", "p") if not pd.isna(row[axis])), None)
        by_name[row["name"], label] = row["value"]
    z = Run(run)["c1"]["logits"][0].double().numpy()
    p, centred = special.softmax(z), z - z.mean()
    variance = (p * z**2).sum() - (p * z).sum() ** 2
    assert by_name["entropy", None] == pytest.approx(stats.entropy(p), abs=1e-10)
    assert by_name["heat_capacity", None] == pytest.approx(variance, abs=1e-9)
    for gauge, logits in (("raw", z), ("centred", centred)):
        assert by_name["log_partition", gauge] == pytest.approx(special.logsumexp(logits), abs=1e-10)
        assert by_name["energy_mean", gauge] == pytest.approx(-(p * logits).sum(), abs=1e-10)
        assert by_name["free_energy", gauge] == pytest.approx(-special.logsumexp(logits), abs=1e-10)
    descending = np.sort(p)[::-1].cumsum()
    assert by_name["nucleus_size", 0.9] == int((descending < 0.9).sum()) + 1
    assert (rows.low.isna()).all() and (rows.n == 1).all()


def test_a_sampled_runs_measures_say_what_its_tokens_were_drawn_from(run):
    frame = Run(run).measures()
    drawn = (frame.rule == "sampled") | (frame.name == "mass_kept")
    rows = frame[(frame.analyzer == "distribution") & drawn & (frame.task_id == "c2")]
    z = Run(run)["c2"]["logits"][:1]
    left = theirs.TopPLogitsWarper(0.8)(z, theirs.TopKLogitsWarper(50)(z, z / 0.9))[0]
    stays = left > -math.inf
    first = rows[rows.step == 0].set_index("name").value
    assert first["nucleus_size"] == int(stays.sum())
    assert first["mass_kept"] == pytest.approx(
        float((z[0].double() / 0.9).softmax(-1)[stays].sum()), abs=1e-6
    )


def test_means_over_a_run_count_tasks_and_nothing_that_a_gauge_moves_is_averaged(run):
    frame = Run(run).measures()
    whole = frame[(frame.analyzer == "distribution") & (frame.task_id == "")]
    entropy = whole[(whole.name == "entropy") & whole.variant.isna() & whole.rule.isna()].iloc[0]
    means = []
    for name in ("c1", "c2"):
        z = Run(run)[name]["logits"].double().numpy()
        means.append(stats.entropy(special.softmax(z, axis=-1), axis=-1).mean())
    assert entropy.value == pytest.approx(np.mean(means), abs=1e-9)
    assert entropy.n == 2
    assert not {"log_partition", "energy_mean", "free_energy", "token_energy"} & set(whole.name)
    analyze(Run(run), ["distribution"])
    assert set(Run(run).measures().analyzer) >= {"distribution"}


def test_every_row_is_as_defined_and_every_defined_measure_is_made(run):
    check_defined(Run(run).measures(), "distribution")


# -- the report ------------------------------------------------------------------------------------------------


def test_the_card_shows_every_decision_and_means_of_whole_distributions(run):
    collected = collect(Run(run))["cards"]["distribution"]
    frame = Run(run).measures()
    rows = frame[(frame.analyzer == "distribution") & (frame.task_id != "")]
    sizes = rows[(rows.name == "nucleus_size") & (rows.p == 0.9)]
    assert sorted(size for _, size, *_ in collected["dots"]) == sorted(sizes.value)
    entropies = rows[(rows.name == "entropy") & rows.rule.isna()]
    assert sorted(x for x, *_ in collected["dots"]) == pytest.approx(sorted(entropies.value), rel=1e-3)
    tasks = Run(run)
    firsts = [tasks["c1"]["logits"][0], tasks["c2"]["logits"][0], tasks["p1"]["base/logits"][0]]
    z = torch.stack(firsts).double().numpy()
    for tau, mean, low, high in collected["curves"]["entropy"]:
        assert mean == pytest.approx(
            stats.entropy(special.softmax(z / tau, axis=-1), axis=-1).mean(), rel=1e-3
        )
        assert low is high is None, "three tasks are too few for an interval"
    for k, mean, *_ in collected["curves"]["nucleus"]:
        expected = np.sort(special.softmax(z, axis=-1), axis=-1)[:, ::-1].cumsum(-1)[:, int(k) - 1].mean()
        assert mean == pytest.approx(expected, rel=1e-3)
    (x, _), (y, _) = collected["energies"]["all"][:2]
    for kind in ("all", "weighted"):
        assert (y - x) * sum(density for _, density in collected["energies"][kind]) == pytest.approx(
            1, rel=1e-2
        )


def test_a_run_without_logits_has_no_card(tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(TASKS[0]) + "\n")
    fresh = probe.run(tasks, model=MODEL, out=tmp_path / "run", capture="resid_post", max_new_tokens=2)
    assert collect(Run(fresh.path))["cards"]["distribution"] is None


@browser
def test_a_browser_draws_the_card(run, tmp_path):
    dom, console = dom_of(write_report(Run(run), tmp_path / "page.html"))
    assert console == []
    card = dom[dom.index("<h3>Output distributions") :]
    card = card[: card.index("</figure>")]
    assert not {"NaN", "undefined", "Infinity"} & set(card.replace('"', " ").split())
    for title in (
        "Tokens of the nucleus",
        "Heat capacity",
        "Energies of tokens",
        "Mass of the most probable",
    ):
        assert title in card
    assert card.count('class="point') > 100


@pytest.mark.parametrize("tau", ["1e-320", "1e300", "1e-200:1:5"])
def test_a_temperature_that_no_float_can_divide_by_is_refused_and_the_extremes_are_finite(tau):
    place = ["distribution", "--model", "random:tiny-llama", "--prompt", "hi", "--json", "--temperature"]
    refused = CliRunner().invoke(main, [*place, tau])
    assert refused.exit_code == 2 and "must lie between 1e-09" in refused.output
    document = json.loads(CliRunner().invoke(main, [*place, "1e-9,1e9"]).stdout)["temperature"]
    assert all(math.isfinite(value) for row in document for value in row.values() if isinstance(value, float))
    assert document[0]["top1"] == pytest.approx(1) and document[1]["entropy"] == pytest.approx(math.log(272))


def test_the_token_in_front_of_a_text_is_told_and_can_be_chosen():
    model = probe.load(MODEL)
    text = model.codec.encode_first("Once upon")
    for given, shown, before in (
        ((), "<|bos|>", [model.tokenizer.bos_token_id]),
        (("--before", ""), "", []),
        (("--before", "<|im_end|>"), "<|im_end|>", model.tokenizer.convert_tokens_to_ids(["<|im_end|>"])),
    ):
        seen = document("--prompt", "Once upon", "--model", MODEL, *given)
        assert seen["source"]["before"] == shown
        assert seen["source"]["n_tokens"] == len(before) + len(text)
        with torch.no_grad():
            logits = model.hf(torch.tensor([[*before, *text]])).logits[0, -1].double()
        top = seen["top"][0]
        assert top["probability"] == pytest.approx(float(logits.softmax(-1)[top["token"]]), abs=1e-6)
    assert "before '<|bos|>'" in call("--prompt", "Once upon", "--model", MODEL).stdout
    assert "<|im_start|>" in call("--prompt", "a", "--model", MODEL, "--before", "word", code=2).stderr
