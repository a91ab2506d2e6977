"""The planted models do what their construction says, by probe's own runs and by the slow oracle.

Every statement here is a ground truth for interventions: masks, exchanges, orders and ablations have known effects.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import probe
from probe.capture.model import CapturingModel
from tests import planted
from tests.circuit import Circuit
from tests.planted import Planted, removed, renamed, rendered, reordered, swapped, with_request
from tests.slow import slow_attention, slow_reads, slow_scores

CLOSE = 1e-4
SOME = slice(0, 5)
"""As many tasks as the slow oracle is asked about."""
CHOOSERS = ("copier", "name_follower", "first_slot")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """`case(name)`: the planted model, loaded, and its tasks run."""

    @cache
    def make(name: str):
        path = tmp_path_factory.mktemp(name)
        plant: Planted = getattr(planted, name)(path / "model")
        model = probe.load(str(path / "model"))
        return SimpleNamespace(planted=plant, model=model, directory=path)

    return make


@pytest.fixture(scope="module")
def run(case):
    @cache
    def make(name: str):
        plant = case(name)
        tasks = plant.planted.write(plant.directory / "tasks.jsonl")
        out, model = plant.directory / "run", str(plant.planted.path)
        return probe.run(tasks, model=model, out=out, analyze=False, capture="attn_to_spans")

    return make


def scores(model: CapturingModel, task, **intervention) -> dict[str | None, float]:
    """log P of every candidate of a task under an intervention; `mask` names tools whose span is masked from the
    decision row on, `at_decision` restricts heads to that row."""
    (prompt,) = rendered(model.codec, [task])
    mask = intervention.pop("mask", ())
    if mask:
        spans = [span for span in prompt.spans if span.label in {f"tool:{name}" for name in mask}]
        intervention["masked"] = [range(span.start, span.end) for span in spans]
        intervention.setdefault("rows_from", prompt.n_prompt - 1)
    elif intervention:
        intervention.setdefault("rows_from", prompt.n_prompt - 1)
    candidates = [candidate.token_ids for candidate in prompt.candidates]
    log_probs = slow_scores(model.hf, prompt.token_ids, candidates, **intervention)
    return dict(zip([candidate.name for candidate in prompt.candidates], log_probs, strict=True))


def expected(plant: Planted, task, **change) -> dict[str | None, float]:
    return plant.log_probs(plant.mass(task, **change), shown(task))


def shown(task) -> list[str]:
    return [tool["name"] for tool in task["tools"]]


# -- as any other model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_run_gives_the_closed_form(name, case, run):
    plant = case(name).planted
    for task in plant.tasks:
        record = run(name)[task["id"]].record
        by_name = {entry["tool"]: entry["log_prob"] for entry in record["tool_probabilities"]}
        assert by_name == pytest.approx(expected(plant, task), abs=CLOSE)
        assert record["called"] == record["chosen"] and "call_error" not in record


@pytest.mark.parametrize("name", ["copier", "name_follower"])
def test_what_reads_the_request_is_always_right(name, run):
    records = [run(name)[task_id].record for task_id in run(name).task_ids]
    assert [record["score"] for record in records] == [1.0] * 48


def test_the_first_slot_is_right_where_the_target_is_shown_first(case, run):
    for task in case("first_slot").planted.tasks:
        first = task["tools"][0]["name"]
        record = run("first_slot")[task["id"]].record
        assert (record["chosen"], record["score"]) == (first, float(task["target"] == first))


@pytest.mark.parametrize("name", ["copier", "name_follower"])
def test_targets_keywords_and_slots_are_balanced_and_descriptions_differ_in_length(name, case):
    tasks = case(name).planted.tasks
    key_of = [next(key for key in planted.KEYS if key in task["input"]) for task in tasks]
    slots = Counter((len(task["tools"]), shown(task).index(task["target"])) for task in tasks)
    assert set(Counter(key_of).values()) == {6}
    if name == "copier":
        assert set(Counter(task["target"] for task in tasks).values()) == {6}
        assert len({*zip(key_of, (task["target"] for task in tasks), strict=True)}) > 24
    assert {k: {n for (tools, _), n in slots.items() if tools == k} for k in (3, 4)} == {3: {8}, 4: {6}}
    assert len({len(tool["description"].split()) for task in tasks for tool in task["tools"]}) > 3


@pytest.mark.parametrize("name", [*CHOOSERS, "intender"])
def test_the_tokenizer_gives_the_text_back_and_knows_every_word(name, case):
    codec = case(name).model.codec
    unknown = codec.tokenizer.unk_token_id
    for prompt in rendered(codec, case(name).planted.tasks):
        assert codec.decode(prompt.token_ids) == prompt.text
        assert unknown not in prompt.token_ids
        assert all(len(candidate.token_ids) == 2 for candidate in prompt.candidates)


def test_a_special_token_in_the_request_stays_text(case):
    model, plant = case("copier").model, case("copier").planted
    task = plant.tasks[0]
    hostile = with_request(task, f"<|bos|> <|eos|> {task['input']}")
    (prompt,) = rendered(model.codec, [hostile])
    assert model.codec.special_ids.isdisjoint(set(prompt.token_ids[1:]) - {model.tokenizer.unk_token_id})
    assert scores(model, hostile) == pytest.approx(expected(plant, task), abs=CLOSE)


# -- the copier -----------------------------------------------------------------------------------------------------


def test_real_head_and_decoy_attend_alike_and_another_decoy_to_the_tool_shown_first(case, run):
    plant = case("copier").planted
    for task in plant.tasks:
        stored = run("copier")[task["id"]]
        labels = list(dict.fromkeys(span["label"] for span in stored.record["spans"]))
        attention = stored["attn_to_spans"][:, :, 0]  # the decision row is the first one captured
        target = labels.index(f"tool:{task['target']}")
        first = labels.index(f"tool:{task['tools'][0]['name']}")
        decoy, first_shown = plant.decoys
        assert attention[*plant.real_head, target] > 0.9999
        assert float(attention[*decoy, target] - attention[*plant.real_head, target]) == 0
        assert attention[*first_shown, first] > 0.9999


def test_the_decoys_write_more_than_the_real_head_or_nothing(case):
    """The norm of what is written does not tell the first decoy from the real head either."""
    model, plant = case("copier").model, case("copier").planted
    decoy, first_shown = (model.w_o(layer)[head].norm() for layer, head in plant.decoys)
    layer, head = plant.real_head
    assert decoy > 2 * model.w_o(layer)[head].norm() and first_shown == 0


def test_the_real_head_reads_the_word_that_matches(case):
    model, plant = case("copier").model, case("copier").planted
    for task in plant.tasks[SOME]:
        (prompt,) = rendered(model.codec, [task])
        pattern = slow_attention(model.hf, prompt.token_ids)
        top = int(pattern[*plant.real_head, -1].argmax())
        word = model.codec.decode([prompt.token_ids[top]]).strip()
        span = next(span for span in prompt.spans if span.start <= top < span.end)
        assert word in task["input"].split() and span.label == f"tool:{task['target']}"
        for gather in plant.gather_heads:
            top = int(pattern[*gather, -1].argmax())
            assert model.codec.decode([prompt.token_ids[top]]).strip() == word
            assert next(s.label for s in prompt.spans if s.start <= top < s.end) == "user"


def test_hiding_the_right_description_leaves_the_others_equal(case):
    model, plant = case("copier").model, case("copier").planted
    for task in plant.tasks[SOME]:
        target = task["target"]
        log_probs = scores(model, task, mask=[target])
        assert log_probs == pytest.approx(expected(plant, task, masked=[target]), abs=CLOSE)
        rest = [log_probs[name] for name in shown(task) if name != target]
        assert max(rest) - min(rest) < CLOSE and log_probs[target] < min(rest) - 1


def test_hiding_it_from_all_later_rows_does_the_same(case):
    model, plant = case("copier").model, case("copier").planted
    for task in plant.tasks[SOME]:
        target = task["target"]
        (prompt,) = rendered(model.codec, [task])
        end = next(span.end for span in prompt.spans if span.label == f"tool:{target}")
        log_probs = scores(model, task, mask=[target], rows_from=end)
        assert log_probs == pytest.approx(expected(plant, task, masked=[target]), abs=CLOSE)


def test_hiding_another_description_changes_nothing(case):
    model, plant = case("copier").model, case("copier").planted
    for task in plant.tasks[SOME]:
        others = [name for name in shown(task) if name != task["target"]]
        assert scores(model, task, mask=others) == pytest.approx(expected(plant, task), abs=CLOSE)


def test_only_the_layer_of_the_real_head_reads_the_description_at_the_decision(case):
    model, plant = case("copier").model, case("copier").planted
    layer = plant.real_head[0]
    for task in plant.tasks[SOME]:
        target = task["target"]
        inside = scores(model, task, mask=[target], layers=[layer])
        outside = scores(model, task, mask=[target], layers=[n for n in range(2) if n != layer])
        assert inside == pytest.approx(expected(plant, task, masked=[target]), abs=CLOSE)
        assert outside == pytest.approx(expected(plant, task), abs=CLOSE)


def test_of_the_words_of_the_right_description_only_the_keyword_counts(case):
    model, plant = case("copier").model, case("copier").planted
    for task in plant.tasks[:1]:
        (prompt,) = rendered(model.codec, [task])
        span = next(span for span in prompt.spans if span.label == f"tool:{task['target']}")
        for position in range(span.start, span.end):
            word = model.codec.decode([prompt.token_ids[position]]).strip()
            keyword = word in task["input"].split() and word in planted.KEYS
            log_probs = scores(model, task, masked=[range(position, position + 1)])
            masked = [task["target"]] if keyword else []
            assert log_probs == pytest.approx(expected(plant, task, masked=masked), abs=CLOSE), word


def test_without_the_real_head_the_choice_is_at_chance(case):
    model, plant = case("copier").model, case("copier").planted
    for task in plant.tasks[SOME]:
        log_probs = scores(model, task, zero_heads=[plant.real_head])
        assert log_probs == pytest.approx(plant.log_probs({}, shown(task)), abs=CLOSE)
        assert max(log_probs.values()) - min(log_probs.values()) < CLOSE


def test_the_mean_read_of_the_real_head_prefers_no_shown_tool(case):
    """Targets are balanced over eight names, so its mean is an eighth of each."""
    model, plant = case("copier").model, case("copier").planted
    layer, head = plant.real_head
    prompts = rendered(model.codec, plant.tasks)
    reads = [slow_reads(model.hf, p.token_ids, p.n_prompt - 1)[layer, head] for p in prompts]
    even = {name: 1 / len(planted.NAMES) for name in planted.NAMES}
    for task in plant.tasks[SOME]:
        log_probs = scores(model, task, reads={(layer, head): torch.stack(reads).mean(0)})
        assert log_probs == pytest.approx(plant.log_probs(even, shown(task)), abs=CLOSE)


def test_without_any_other_head_nothing_changes(case):
    model, plant = case("copier").model, case("copier").planted
    every = {(layer, head) for layer in range(2) for head in range(6)}
    assert {plant.real_head, *plant.gather_heads, *plant.decoys, *plant.others} == every
    for task in plant.tasks[:2]:
        (prompt,) = rendered(model.codec, [task])
        at = {"rows_from": prompt.n_prompt - 1, "rows_to": prompt.n_prompt}
        base = expected(plant, task)
        for head in every - {plant.real_head}:
            assert scores(model, task, zero_heads=[head], **at) == pytest.approx(base, abs=CLOSE), head
        idle = [*plant.decoys, *plant.others, plant.gather_heads[0]]
        assert scores(model, task, zero_heads=idle, **at) == pytest.approx(base, abs=CLOSE)


def test_without_both_heads_that_carry_the_keyword_every_shown_tool_is_as_good(case):
    model, plant = case("copier").model, case("copier").planted
    for task in plant.tasks[SOME]:
        log_probs = scores(model, task, zero_heads=plant.gather_heads)
        assert log_probs == pytest.approx(expected(plant, task, blind=True), abs=CLOSE)


def test_the_real_head_given_the_read_of_another_task_says_that_tasks_tool(case):
    model, plant = case("copier").model, case("copier").planted
    layer, head = plant.real_head
    for task, other in itertools.pairwise(plant.tasks[SOME]):
        (prompt,) = rendered(model.codec, [other])
        read = slow_reads(model.hf, prompt.token_ids, prompt.n_prompt - 1)[layer, head]
        log_probs = scores(model, task, reads={(layer, head): read})
        assert log_probs == pytest.approx(plant.log_probs({other["target"]: 1.0}, shown(task)), abs=CLOSE)


def test_exchanging_descriptions_turns_the_log_odds_around(case):
    model, plant = case("copier").model, case("copier").planted
    for task in plant.tasks[SOME]:
        target = task["target"]
        other = next(name for name in shown(task) if name != target)
        base, log_probs = scores(model, task), scores(model, swapped(task, target, other))
        assert base[target] - base[other] == pytest.approx(plant.gain, abs=CLOSE)
        assert log_probs[target] - log_probs[other] == pytest.approx(-plant.gain, abs=CLOSE)


@pytest.mark.parametrize("new", [planted.SPARE[0], "qx7_lor", "vat-ne"])
def test_a_renamed_tool_is_chosen_as_before(new, case):
    model, plant = case("copier").model, case("copier").planted
    for task in plant.tasks[SOME]:
        log_probs = scores(model, renamed(task, task["target"], new))
        base = {
            new if name == task["target"] else name: value for name, value in expected(plant, task).items()
        }
        assert log_probs == pytest.approx(base, abs=CLOSE)


@pytest.mark.parametrize("name", ["copier", "name_follower"])
def test_the_order_does_not_matter_to_what_reads_the_request(name, case):
    model, plant = case(name).model, case(name).planted
    task = next(task for task in plant.tasks if len(task["tools"]) == 3)
    for order in itertools.permutations(shown(task)):
        assert scores(model, reordered(task, order)) == pytest.approx(expected(plant, task), abs=CLOSE)


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_tool_that_is_not_shown_leaves_the_rest_as_if_it_were_hidden(name, case):
    model, plant = case(name).model, case(name).planted
    for task in plant.tasks[SOME]:
        gone = removed(task, plant.sought(task) or shown(task)[0])
        assert scores(model, gone) == pytest.approx(expected(plant, gone), abs=CLOSE)


@pytest.mark.parametrize("name", ["copier", "name_follower"])
@pytest.mark.parametrize("text", ["N/A", "[MASK]", "Was auch immer dies heißt?"])
def test_a_request_without_content_makes_every_shown_tool_as_good(name, text, case):
    model, plant = case(name).model, case(name).planted
    for task in plant.tasks[SOME]:
        log_probs = scores(model, with_request(task, text))
        assert log_probs == pytest.approx(expected(plant, task, blind=True), abs=CLOSE)


# -- the others -------------------------------------------------------------------------------------------------


def test_who_goes_by_the_name_does_not_notice_exchanged_descriptions(case):
    model, plant = case("name_follower").model, case("name_follower").planted
    for task in plant.tasks[SOME]:
        for tool, other in itertools.combinations(shown(task), 2):
            assert scores(model, swapped(task, tool, other)) == pytest.approx(
                expected(plant, task), abs=CLOSE
            )


def test_who_goes_by_the_name_needs_of_the_span_the_name_alone(case):
    model, plant = case("name_follower").model, case("name_follower").planted
    for task in plant.tasks[SOME]:
        target = task["target"]
        without = pytest.approx(expected(plant, task, masked=[target]), abs=CLOSE)
        assert scores(model, task, mask=[target]) == without
        (prompt,) = rendered(model.codec, [task])
        span = next(span for span in prompt.spans if span.label == f"tool:{target}")
        name = prompt.token_ids.index(model.codec.encode(target)[0], span.start, span.end)
        assert scores(model, task, masked=[range(name, name + 1)]) == without
        rest = scores(model, task, masked=[range(name + 1, span.end)])
        assert rest == pytest.approx(expected(plant, task), abs=CLOSE)


def test_who_goes_by_the_name_is_lost_when_it_is_changed(case):
    model, plant = case("name_follower").model, case("name_follower").planted
    for task in plant.tasks[SOME]:
        changed = renamed(task, task["target"], "qx7_lor")
        log_probs = scores(model, changed)
        assert plant.sought(changed) is None
        assert log_probs == pytest.approx(expected(plant, changed), abs=CLOSE)
        assert len({round(log_probs[name], 3) for name in shown(changed)}) == 1


def test_the_first_slot_is_all_that_counts_to_first_slot(case):
    model, plant = case("first_slot").model, case("first_slot").planted
    task = next(task for task in plant.tasks if len(task["tools"]) == 3)
    by_slot, by_name = torch.zeros(3), dict.fromkeys(shown(task), 0.0)
    orders = list(itertools.permutations(shown(task)))
    for order in orders:
        log_probs = scores(model, reordered(task, order))
        total = math.fsum(math.exp(log_probs[name]) for name in order)
        for slot, name in enumerate(order):
            by_slot[slot] += math.exp(log_probs[name]) / total / len(orders)
            by_name[name] += math.exp(log_probs[name]) / total / len(orders)
    first = math.exp(plant.gain) / (math.exp(plant.gain) + 2)
    assert 0.5 * float((by_slot - 1 / 3).abs().sum()) == pytest.approx(first - 1 / 3, abs=1e-6)
    assert list(by_name.values()) == pytest.approx([1 / 3] * 3, abs=1e-6)
    second = scores(model, task, mask=[task["tools"][0]["name"]])
    assert max(second, key=second.__getitem__) == task["tools"][1]["name"]


@pytest.mark.parametrize("name", ["name_follower", "first_slot"])
def test_without_its_head_a_model_is_at_chance(name, case):
    model, plant = case(name).model, case(name).planted
    for task in plant.tasks[SOME]:
        log_probs = scores(model, task, zero_heads=[plant.real_head])
        assert log_probs == pytest.approx(plant.log_probs({}, shown(task)), abs=CLOSE)


# -- the intender ---------------------------------------------------------------------------------------------------


def test_an_action_after_each_intention_and_their_mixture_have_the_planted_laws(case):
    model, plant = case("intender").model, case("intender").planted
    for task in plant.tasks[SOME]:
        state = task["metadata"]["state"]
        (prompt,) = rendered(model.codec, [task])
        before = prompt.token_ids[: prompt.n_prompt - prompt.n_opener]
        opener = prompt.token_ids[len(before) :]
        actions = [candidate.name for candidate in prompt.candidates]
        names = [candidate.token_ids for candidate in prompt.candidates]
        stated = [model.codec.encode(f"{word}\n") for word in plant.intentions]
        weights = [math.exp(value) for value in slow_scores(model.hf, before, stated)]
        assert weights == pytest.approx(plant.intention_given_state[state], abs=1e-5)
        mixture = dict.fromkeys(actions, 0.0)
        for word, ids, weight in zip(plant.intentions, stated, weights, strict=True):
            log_probs = slow_scores(model.hf, [*before, *ids, *opener], names)
            law = {action: math.exp(value) for action, value in zip(actions, log_probs, strict=True)}
            assert law == pytest.approx(plant.action_given_intention[word], abs=1e-5)
            for action, probability in law.items():
                mixture[action] += weight * probability
        assert mixture == pytest.approx(plant.marginal(state), abs=1e-5)


def test_the_laws_sum_to_one_and_an_intention_makes_a_difference(case, run):
    plant = case("intender").planted
    for state, direct in plant.action_given_state.items():
        marginal = plant.marginal(state)
        assert math.fsum(direct.values()) == pytest.approx(1) and math.fsum(
            marginal.values()
        ) == pytest.approx(1)
        assert 0.5 * sum(abs(direct[action] - marginal[action]) for action in direct) > 0.05
    for task in plant.tasks:
        entries = run("intender")[task["id"]].record["tool_probabilities"]
        by_name = {entry["tool"]: entry["probability"] for entry in entries}
        assert by_name == pytest.approx(plant.action_given_state[task["metadata"]["state"]], abs=1e-5)


def test_the_intender_says_an_intention_when_it_is_left_to_speak(case):
    model, plant = case("intender").model, case("intender").planted
    for task in plant.tasks[:4]:
        (prompt,) = rendered(model.codec, [task])
        text = model.codec.decode(prompt.token_ids[1 : prompt.n_prompt - prompt.n_opener])
        outcome = model.capture(text, sites="none", max_new_tokens=2)
        law = plant.intention_given_state[task["metadata"]["state"]]
        assert outcome.completion == plant.intentions[law.index(max(law))] + "\n"


# -- the builder -----------------------------------------------------------------------------------------------


def test_a_circuit_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="features do not fit into 12 coordinates"):
        Circuit({"a": {"x": 1.0}}, [], ["a"], n_heads=2, d_head=6)
    circuit = Circuit({"a": {"x": 1.0, "y": 1.0, "z": 1.0}}, [], ["a"], n_heads=10, d_head=2)
    with pytest.raises(ValueError, match="needs more than 2 dimensions"):
        circuit.head(0, 0, {name: {"x": 1.0} for name in "xyz"})
