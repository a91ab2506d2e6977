"""Comparing two runs: the first difference names where they part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from probe.errors import ArtifactCorrupt
from probe.runs import TOLERANCES, Array, Difference, Run, RunWriter, diff

N_LAYERS, N_ROWS, N_KEYS = 4, 3, 6
FLOW = ["keys", "values", "queries", "attn_to_spans", "value_to_spans", "z", "resid_post", "resid_span_mean"]


def tensors(
    dtype: torch.dtype = torch.float32, layers: int = N_LAYERS, first_row: int = 4
) -> dict[str, Array]:
    """Every site of the contract for a prompt of 5 tokens and 2 new ones; position 0 is an attention sink."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).clamp(-2, 2).to(dtype)

    keys, values = normal(layers, 1, N_KEYS, 2), normal(layers, 1, N_KEYS, 2)
    means = normal(layers, 3, 4)
    keys[:, :, 0], means[:, 0] = 3000.0, 3000.0
    attention = ("layer", "head", "row", "span")
    return {
        "token_ids": Array(torch.arange(7), ("position",)),
        "rows": Array(torch.arange(first_row, first_row + N_ROWS), ("row",)),
        "decisions": Array(torch.tensor([4]), ("decision",)),
        "keys": Array(keys, ("layer", "kv_head", "position", "d_head")),
        "values": Array(values, ("layer", "kv_head", "position", "d_head")),
        "queries": Array(normal(layers, 2, N_ROWS, 2), ("layer", "head", "row", "d_head")),
        "attn_to_spans": Array(normal(layers, 2, N_ROWS, 3).softmax(-1), attention),
        "value_to_spans": Array(normal(layers, 2, N_ROWS, 3).abs(), attention),
        "z": Array(normal(layers, 2, N_ROWS, 2), ("layer", "head", "row", "d_head")),
        "resid_post": Array(normal(layers, N_ROWS, 4), ("layer", "row", "d_model")),
        "resid_span_mean": Array(means, ("layer", "span", "d_model")),
        "logits": Array(normal(1, 9).float(), ("decision", "d_vocab")),
        "log_probs": Array(-normal(2).abs().float(), ("step",)),
    }


def record(task_id: str = "t", **more: Any) -> dict[str, Any]:
    entry = {
        "tool": "search",
        "token_ids": [5, 6],
        "log_prob": -0.5,
        "probability": 0.6,
        "choice_probability": 0.7,
    }
    return {
        "id": task_id, "kind": "tool_selection", "status": "ok", "seconds": 1.0, "score": 1.0,
        "completion": "yes", "n_prompt": 5, "token_ids": list(range(7)), "chosen_tool": "search", "candidate_mass": 0.9,
        "tool_probabilities": [entry], "prompt": "p",
    } | more  # fmt: skip


class Runs:
    """Writes small runs side by side."""

    def __init__(self, path: Path):
        self.path, self.n = path, 0

    def __call__(
        self,
        *tasks: tuple[dict[str, Any], dict[str, Array]],
        dtype: str = "float32",
        metadata: dict[str, str] | None = None,
    ) -> Run:
        self.n += 1
        path = self.path / str(self.n)
        labels = {"labels": json.dumps(["bos", "tool:search", "user"])}
        run = {"model": {"dtype": dtype}, "task_ids": [task["id"] for task, _ in tasks]}
        with RunWriter.create(path, run) as writer:
            for task, arrays in tasks:
                writer.commit(task, arrays, labels | (metadata or {}))
            writer.finish("done")
        return Run(path)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def changed(arrays: dict[str, Array], name: str, index: tuple[Any, ...], by: float) -> dict[str, Array]:
    """A copy with `by` added at one index."""
    tensor = arrays[name].tensor.clone()
    tensor[index] += by
    return arrays | {name: Array(tensor, arrays[name].axes)}


def first(actual: list[Difference]) -> tuple[str, str, int | None]:
    return actual[0].task_id, actual[0].site, actual[0].layer


def test_a_run_equals_itself_and_timings_do_not_count(runs):
    first = runs((record(), tensors()))
    assert diff(first, runs((record(seconds=9.0, prompt="same ids"), tensors()))) == []


@pytest.mark.parametrize("name", FLOW)
def test_a_perturbed_layer_is_named_with_its_row(runs, name):
    index = {
        "keys": (2, 0, 3, 1),
        "values": (2, 0, 3, 1),
        "resid_post": (2, 1, 3),
        "resid_span_mean": (2, 1, 0),
    }
    differences = diff(
        runs((record(), tensors())),
        runs((record(), changed(tensors(), name, index.get(name, (2, 1, 1, 1)), 0.1))),
    )
    assert len(differences) == 1 and first(differences) == ("t", name, 2)
    assert differences[0].kind == "value" and differences[0].max_abs == pytest.approx(0.1, rel=1e-3)
    row, position = {"keys": (None, 3), "values": (None, 3), "resid_span_mean": (None, None)}.get(
        name, (1, 5)
    )
    assert (differences[0].row, differences[0].position) == (row, position)
    assert "layer 2" in differences[0].message and name in differences[0].message
    if name == "resid_span_mean":
        assert "'tool:search'" in differences[0].message


def test_within_a_layer_the_order_is_that_of_the_data_flow_and_outputs_come_last(runs):
    other = tensors()
    for name in FLOW:
        for layer in (1, 3):
            other = changed(other, name, (layer, Ellipsis, -1, -1), 0.5)
    for name, index in {"logits": (0, 0), "log_probs": (1,)}.items():
        other = changed(other, name, index, 1)
    more = {"completion": "no", "score": 0.0, "chosen_tool": "other"}
    differences = diff(runs((record(), tensors())), runs((record(**more), other)))
    places = [(difference.site, difference.layer) for difference in differences]
    assert places[:16] == [(name, layer) for layer in (1, 3) for name in FLOW]
    assert set(places[16:18]) == {("logits", None), ("log_probs", None)}
    assert {site for site, _ in places[18:]} == {"record.completion", "record.score", "record.chosen_tool"}


def test_before_other_tokens_comes_the_layer_that_made_them(runs):
    """The last emitted token differs: every row ran on the same tokens, so the layer is the cause."""
    other = changed(changed(tensors(), "resid_post", (2, 0, 0), 0.5), "token_ids", (6,), 1)
    other = changed(other, "resid_span_mean", (0, 1, 0), 0.5)
    ids = [0, 1, 2, 3, 4, 5, 7]
    differences = diff(runs((record(), tensors())), runs((record(token_ids=ids), other)))
    places = [(difference.site, difference.layer, difference.row) for difference in differences]
    assert places == [("resid_post", 2, 0), ("record.token_ids", None, None)]


def test_rows_after_a_fork_in_the_tokens_are_not_compared(runs):
    """Token 5 differs, so the row at position 5 and the keys from there on saw something else."""
    other = changed(tensors(), "token_ids", (5,), 1)
    for name in ("resid_post", "keys", "z"):
        other = changed(other, name, (1, Ellipsis, -1, -1), 0.5)
    differences = diff(runs((record(), tensors())), runs((record(token_ids=[0, 1, 2, 3, 4, 6, 6]), other)))
    assert [difference.site for difference in differences] == ["record.token_ids"]


def test_the_first_task_of_the_baseline_comes_first(runs):
    good, bad = tensors(), changed(tensors(), "resid_post", (0, 0, 0), 1)
    late = changed(tensors(), "logits", (0, 0), 1)
    ids = ("z", "m", "a")
    first = runs(*((record(task_id), good) for task_id in ids))
    second = runs(
        *((record(task_id), arrays) for task_id, arrays in zip(ids, (good, late, bad), strict=True))
    )
    assert [difference.task_id for difference in diff(first, second)] == ["m", "a"]


RELATIVE = ("keys", "values", "queries", "value_to_spans", "z", "resid_post", "resid_span_mean", "logits")
INDEX = {
    "keys": (1, 0, 2, 0), "values": (1, 0, 2, 0), "resid_post": (1, 2, 0), "resid_span_mean": (1, 2, 0),
    "logits": (0, 3), "log_probs": (1,),
}  # fmt: skip


@pytest.mark.parametrize("factor, equal", [(0.98, True), (1.02, False)])
@pytest.mark.parametrize("name", [*RELATIVE, "attn_to_spans", "log_probs"])
def test_the_tolerance_is_the_contract_s_to_two_percent(runs, name, factor, equal):
    """float64 tensors in a float32 run, so that rounding does not blur the edge."""
    arrays = {
        key: Array(a.tensor.double() if a.tensor.is_floating_point() else a.tensor, a.axes)
        for key, a in tensors().items()
    }
    index = INDEX.get(name, (1, 0, 1, 1))
    tensor = arrays[name].tensor
    if name in RELATIVE:
        compared = tensor if name == "logits" else tensor[1]
        compared = compared[:, 1:] if name in ("keys", "values") else compared
        compared = compared[1:] if name == "resid_span_mean" else compared
        allowed = 5e-5 * float(compared.abs().max())
    else:
        allowed = {"attn_to_spans": 1e-5, "log_probs": 1e-4}[name]
    # Away from zero in a number that is not the largest, or the scale would move with it.
    differences = diff(
        runs((record(), arrays)), runs((record(), changed(arrays, name, index, factor * allowed)))
    )
    assert (differences == []) == equal
    if not equal:
        assert differences[0].tolerance == pytest.approx(allowed)


def test_the_scale_is_the_layer_s_own(runs):
    arrays = tensors()
    big = changed(arrays, "resid_post", (3, 0, 0), 1e5)
    small = changed(big, "resid_post", (1, 0, 0), 0.01)
    assert first(diff(runs((record(), big)), runs((record(), small)))) == ("t", "resid_post", 1)


def test_the_tolerance_follows_the_dtype_of_the_run(runs):
    arrays = tensors(torch.bfloat16)
    near = changed(arrays, "resid_post", (1, 0, 0), 0.01)
    assert diff(runs((record(), arrays), dtype="bfloat16"), runs((record(), near), dtype="bfloat16")) == []
    assert diff(runs((record(), arrays)), runs((record(), near))) != []
    far = changed(arrays, "resid_post", (1, 0, 0), 0.2)
    assert len(diff(runs((record(), arrays), dtype="float16"), runs((record(), far), dtype="float16"))) == 1
    assert TOLERANCES["float32"] == (5e-5, 1e-5, 1e-4)


@pytest.mark.parametrize("name", ["keys", "values", "resid_span_mean", "resid_post", "queries", "z"])
def test_position_0_is_left_out(runs, name):
    arrays = tensors(first_row=0)
    at_zero = {
        "keys": (1, 0, 0, 0),
        "values": (1, 0, 0, 0),
        "resid_span_mean": (1, 0, 0),
        "resid_post": (1, 0, 0),
    }
    base = runs((record(), arrays))
    assert diff(base, runs((record(), changed(arrays, name, at_zero.get(name, (1, 0, 0, 0)), 50)))) == []
    after = {
        "keys": (1, 0, 1, 0),
        "values": (1, 0, 1, 0),
        "resid_span_mean": (1, 1, 0),
        "resid_post": (1, 1, 0),
    }
    differences = diff(base, runs((record(), changed(arrays, name, after.get(name, (1, 0, 1, 0)), 0.01))))
    assert first(differences) == ("t", name, 1), "its size must not loosen the tolerance of the others either"


def test_row_0_counts_where_it_is_not_position_0(runs):
    differences = diff(
        runs((record(), tensors())), runs((record(), changed(tensors(), "resid_post", (0, 0, 0), 0.1)))
    )
    assert (differences[0].row, differences[0].position) == (0, 4)


def test_nan_equals_nothing_and_equal_infinities_are_equal(runs):
    poisoned = changed(tensors(), "resid_post", (2, 1, 0), float("nan"))
    for left, right in ((poisoned, tensors()), (tensors(), poisoned), (poisoned, poisoned)):
        differences = diff(runs((record(), left)), runs((record(), right)))
        assert (
            first(differences) == ("t", "resid_post", 2)
            and differences[0].kind == "nonfinite"
            and differences[0].max_abs is None
        )
        assert differences[0].row == 1
    infinite = changed(tensors(), "logits", (0, 2), float("inf"))
    assert diff(runs((record(), infinite)), runs((record(), infinite))) == []
    assert diff(runs((record(), tensors())), runs((record(), infinite)))[0].kind == "nonfinite"


def test_a_missing_task_and_an_extra_one(runs):
    first, second = runs((record("a"), {}), (record("b"), {})), runs((record("b"), {}), (record("c"), {}))
    assert [(d.task_id, d.site, d.kind) for d in diff(first, second)] == [
        ("a", "task", "missing"),
        ("c", "task", "extra"),
    ]


def test_a_missing_tensor_another_shape_and_another_dtype(runs):
    arrays = tensors()
    fewer = {name: array for name, array in arrays.items() if name != "z"}
    assert [(d.site, d.kind) for d in diff(runs((record(), arrays)), runs((record(), fewer)))] == [
        ("z", "missing")
    ]
    assert [(d.site, d.kind) for d in diff(runs((record(), fewer)), runs((record(), arrays)))] == [
        ("z", "extra")
    ]
    axes = arrays["resid_post"].axes
    short = arrays | {"resid_post": Array(arrays["resid_post"].tensor[:, :2], axes)}
    assert [(d.site, d.kind) for d in diff(runs((record(), arrays)), runs((record(), short)))] == [
        ("resid_post", "shape")
    ]
    half = arrays | {"resid_post": Array(arrays["resid_post"].tensor.half(), axes)}
    assert [(d.site, d.kind) for d in diff(runs((record(), arrays)), runs((record(), half)))] == [
        ("resid_post", "dtype")
    ]


def test_a_task_that_failed_in_one_run_is_one_difference_and_its_status(runs):
    failed = record(status="error", error="out of memory")
    differences = diff(runs((record(), tensors())), runs((failed, {})))
    assert [(d.site, d.kind) for d in differences] == [("tensors", "missing"), ("record.status", "exact")]
    assert "'ok' and 'error'" in differences[0].message


def test_layers_are_compared_by_number(runs):
    arrays = {name: tensors()[name] for name in ("token_ids", "rows", "resid_post")}
    post = arrays["resid_post"]
    some = arrays | {"resid_post": Array(post.tensor[[1, 3]], post.axes)}
    all_layers = runs((record(), arrays), metadata={"layers": "[0, 1, 2, 3]"})
    differences = diff(all_layers, runs((record(), some), metadata={"layers": "[1, 3]"}))
    assert [(d.site, d.layer, d.kind) for d in differences] == [
        ("resid_post", 0, "missing"),
        ("resid_post", 2, "missing"),
    ]
    moved = changed(some, "resid_post", (1, 0, 0), 1)
    differences = diff(
        runs((record(), some), metadata={"layers": "[1, 3]"}),
        runs((record(), moved), metadata={"layers": "[1, 3]"}),
    )
    assert first(differences) == ("t", "resid_post", 3)


def test_each_variant_of_a_prompting_task_has_its_own_rows_and_the_lowest_layer_wins(runs):
    def variants(first_row: int) -> dict[str, Array]:
        both = {"base": tensors(first_row=first_row), "v.score/x": tensors()}
        return {
            f"{variant}/{name}": array for variant, arrays in both.items() for name, array in arrays.items()
        }

    passages: dict[str, Any] = {"passages": {"base": {"completion": "a"}, "v.score/x": {"completion": "b"}}}
    other = changed(variants(0), "base/resid_post", (3, 1, 0), 1)
    other = changed(other, "v.score/x/resid_post", (1, 0, 0), 1)
    other = changed(other, "base/resid_post", (3, 0, 0), 1)  # position 0 of this variant
    wrong: dict[str, Any] = {"passages": {"base": {"completion": "a"}, "v.score/x": {"completion": "c"}}}
    differences = diff(runs((record(**passages), variants(0))), runs((record(**wrong), other)))
    assert [(d.site, d.layer, d.row, d.position) for d in differences] == [
        ("v.score/x/resid_post", 1, 0, 4),
        ("base/resid_post", 3, 1, 1),
        ("record.passages.v.score/x.completion", None, None, None),
    ]


@pytest.mark.parametrize(
    "field, inside, outside",
    [
        ("log_prob", -0.50009, -0.5002),
        ("probability", 0.600009, 0.60002),
        ("choice_probability", 0.700009, 0.69998),
    ],
)
def test_tool_probabilities_have_their_tolerance(runs, field, inside, outside):
    base = runs((record(), {}))
    for value, equal in ((inside, True), (outside, False)):
        other = record()
        other["tool_probabilities"][0][field] = value
        differences = diff(base, runs((other, {})))
        assert (differences == []) == equal
        assert equal or differences[0].site == f"record.tool_probabilities.0.{field}"


@pytest.mark.parametrize(
    "more",
    [{"status": "nonfinite"}, {"completion": "no"}, {"score": 1.0 - 1e-12}, {"score": None}, {"chosen": "x"},
     {"chosen_tool": None}, {"tool_probabilities": []}, {"candidate_mass": 0.89}, {"candidate_mass": None}],
)  # fmt: skip
def test_what_is_a_result_in_the_record_is_compared(runs, more):
    differences = diff(runs((record(), {})), runs((record(**more), {})))
    assert [d.site for d in differences] == [f"record.{next(iter(more))}"]


def test_a_difference_can_be_written_as_json(runs):
    import dataclasses

    other = changed(changed(tensors(), "resid_post", (1, 1, 0), float("nan")), "keys", (0, 0, 1, 0), 1)
    differences = diff(runs((record(), tensors())), runs((record(score=None), other)))
    assert (
        json.loads(json.dumps([dataclasses.asdict(d) for d in differences], allow_nan=False))[0]["site"]
        == "keys"
    )


def test_a_damaged_run_is_an_error_and_not_a_difference(runs):
    first, second = runs((record(), tensors())), runs((record(), tensors()))
    name = next(second.path.glob("tasks/*/*/tensors.safetensors"))
    name.write_bytes(name.read_bytes()[:-1])
    with pytest.raises(ArtifactCorrupt, match="tensors.safetensors: truncated"):
        diff(first, second)
