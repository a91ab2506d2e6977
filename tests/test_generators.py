"""Runs whose tokens a generator chooses: the numbers of a run that chooses them itself, and what is said where they differ."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import probe
from probe.capture import Job
from probe.capture.given import GeneratedToken, GivenTokens
from probe.capture.given import given as with_tokens
from probe.errors import ModelUnavailable, RunDirectoryError, UsageError
from probe.harness import generators, runner
from probe.harness.generators import generated_tokens
from probe.maths.agreement import AGREEMENT
from probe.model.generation import generate_tokens
from probe.prompts import prompt_of_tokens
from tests.conftest import tiny
from tests.test_capture import PARITY, relative

TOOLS = [
    {
        "name": name,
        "description": f"Gives {name}.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    }
    for name in ("weather", "calculator", "calendar")
]
LINES = [
    *(
        {
            "id": f"t{n}",
            "kind": "tool_selection",
            "messages": [{"role": "user", "content": text}],
            "tools": TOOLS,
            "target": "weather",
        }
        for n, text in enumerate(["Rain in Oslo?", "Rain in Bergen tomorrow, or snow?", "What is 6 * 7?"])
    ),
    {"id": "c1", "kind": "cot", "question": "What is 3 + 4?", "answer": 7, "steps": ["3 and 4 are 7."]},
    {
        "id": "p1",
        "kind": "prompting",
        "input": "The sea is ",
        "variants": [{"name": "base"}, {"name": "told", "prefix": "Say a colour. "}],
        "choices": ["blue", "red"],
    },
]
SPENT = {"seconds", "replay_agreement"}


@pytest.fixture(scope="module")
def model():
    return tiny("tiny-llama")


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """The run that chooses its own tokens."""
    return probe.run(
        LINES, model=model, out=tmp_path_factory.mktemp("own") / "run", analyze=False, capture="all", **SHORT
    )


SHORT: dict[str, Any] = {"max_new_tokens": 24, "batch_size": 4}


def passages(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from record.get("passages", {"main": record}).values()


def alike(now: Any, was: Any) -> None:
    """Equal values, numbers within 1e-4."""
    if isinstance(was, dict):
        assert now.keys() - SPENT == was.keys() - SPENT
        for key in was.keys() - SPENT:
            alike(now[key], was[key])
    elif isinstance(was, list):
        assert len(now) == len(was)
        for pair in zip(now, was, strict=True):
            alike(*pair)
    elif isinstance(was, float):
        assert now == pytest.approx(was, abs=1e-4)
    else:
        assert now == was


def same_numbers(run: Any, plain: Any) -> None:
    for task in plain:
        again = run[task.id]
        alike(again.record, task.record)
        for passage in passages(again.record):
            agreement = passage["replay_agreement"]
            assert agreement["argmax_share"] == 1.0 and not agreement["disagrees"]
            assert agreement["largest_delta_log_prob"] < 1e-4
        assert [*again] == [*task]
        for name in task:
            assert relative(again[name].float(), task[name].float()) <= PARITY, (task.id, name)


def test_tokens_that_transformers_generates_give_the_numbers_of_the_run_itself(model, plain, tmp_path):
    run = probe.run(
        LINES,
        model=model,
        out=tmp_path / "run",
        analyze=False,
        capture="all",
        generator="transformers",
        **SHORT,
    )
    same_numbers(run, plain)
    assert run.run["generator"] == {"name": "transformers"}
    assert run.run["options"]["generator"] == "transformers"


# -- a server ------------------------------------------------------------------------------------------------------


class StandIn(ThreadingHTTPServer):
    """Answers as vLLM's server does, with the tokens of transformers."""

    daemon_threads = True

    def __init__(self, model: Any):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.model = model
        self.asked: list[dict[str, Any]] = []
        self.served = ["tiny"]
        self.broken: int | None = None
        self.one_at_a_time = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing on stderr: a client may have gone."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.one_at_a_time:
            self.asked.append(request)
            ids, log_probs = generate_tokens(
                self.model, request["prompt"], request["max_tokens"], request["stop_token_ids"]
            )
        stopped = ids[-1] in request["stop_token_ids"]
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": ids[-1] if stopped else None,
            "prompt_token_ids": request["prompt"],
            "token_ids": ids,
            "logprobs": {"token_logprobs": log_probs, "tokens": [], "top_logprobs": [], "text_offset": []},
        }
        return {"id": "cmpl-1", "object": "text_completion", "model": request["model"], "choices": [choice]}


class _Answers(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._send(200, {"object": "list", "data": [{"id": name} for name in self.server.served]})

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.broken is not None:
            self._send(self.server.broken, {"message": "no"})
        else:
            self._send(200, self.server.answer(request))

    def _send(self, code: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server(model):
    with StandIn(model) as answering:
        thread = threading.Thread(target=answering.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield answering
        answering.shutdown()
        thread.join()


def test_tokens_of_a_server_give_the_numbers_of_the_run_itself(model, plain, server, tmp_path):
    run = probe.run(
        LINES,
        model=model,
        out=tmp_path / "run",
        analyze=False,
        capture="all",
        generator="vllm",
        generator_url=server.url,
        **SHORT,
    )
    same_numbers(run, plain)
    assert run.run["generator"] == {"name": "vllm", "url": server.url, "model": "tiny"}
    first = server.asked[0]
    assert first["return_token_ids"] and first["logprobs"] == 0 and first["temperature"] == 0
    assert first["prompt"] in [
        task.record["token_ids"][: task.record["n_prompt"]] for task in list(plain)[:4]
    ]


def test_a_server_of_another_model_is_told_from_the_one_at_hand(model, server, tmp_path):
    server.model = probe.load("random:tiny-llama")
    with torch.no_grad():
        server.model.hf.lm_head.weight.mul_(1.5)
    lines = []

    class Watching(runner.SilentProgress):
        def log(self, message: str) -> None:
            lines.append(message)

    run = probe.run(
        LINES[:1],
        model=model,
        out=tmp_path / "run",
        generator="vllm",
        generator_url=server.url,
        progress=Watching(),
        **SHORT,
    )
    agreement = run["t0"].record["replay_agreement"]
    assert agreement["disagrees"] and agreement["mean_delta_log_prob"] > AGREEMENT
    assert any("another model than the one at hand" in line for line in lines)
    rows = run.measures()
    assert rows[rows.name == "replay_delta_log_prob"].value.tolist() == [agreement["mean_delta_log_prob"]]


def test_a_run_goes_on_with_the_generator_that_it_began_with(model, plain, server, tmp_path, monkeypatch):
    path = tmp_path / "run"
    asked = {"generator": "vllm", "generator_url": server.url, "capture": "all", **SHORT}
    server.broken = 500
    with pytest.raises(ModelUnavailable, match="answers 500"):
        probe.run(LINES, model=model, out=path, analyze=False, **asked)
    server.broken, server.served = None, ["other"]
    with pytest.raises(RunDirectoryError, match="start a new run"):
        runner.resume(path, load=lambda _: model)
    server.served = ["tiny"]
    same_numbers(runner.resume(path, load=lambda _: model), plain)


def test_a_prompt_that_a_server_refuses_fails_its_task_alone(model, server, tmp_path):
    server.broken = 400
    run = probe.run(
        LINES[:2],
        model=model,
        out=tmp_path / "run",
        analyze=False,
        generator="vllm",
        generator_url=server.url,
    )
    assert [task.record["status"] for task in run] == ["error", "error"]
    assert "answers 400" in run["t0"].record["error"]


def test_what_is_no_answer_of_a_server_is_said(server):
    choices = generators_options(generator="vllm", generator_url="http://127.0.0.1:9")
    with pytest.raises(ModelUnavailable, match="does not answer"):
        generators.VllmGenerator(choices)
    server.served = ["a", "b"]
    with pytest.raises(UsageError, match="serves a, b: name one"):
        generators.VllmGenerator(generators_options(generator="vllm", generator_url=server.url))
    named = generators_options(generator="vllm", generator_url=f"{server.url}/v1/", generator_model="b")
    assert generators.VllmGenerator(named).describe()["model"] == "b"
    for answer in (
        None,
        {},
        {"choices": []},
        {"choices": [{"text": "x"}]},
        {"choices": [{"token_ids": [-1]}]},
    ):
        with pytest.raises(ModelUnavailable, match=r"no choices|no token ids"):
            generated_tokens(answer)
    kept = {"choices": [{"token_ids": [5, 7], "logprobs": {"token_logprobs": [-0.5, None]}}]}
    assert generated_tokens(kept) == [(5, -0.5), (7, None)]
    assert generated_tokens({"choices": [{"token_ids": [5], "logprobs": None}]}) == [(5, None)]


def generators_options(**given: Any) -> Any:
    from probe.harness.plan import make_options

    return make_options("random:tiny-llama", given)


# -- nothing generated ---------------------------------------------------------------------------------------------


def test_a_run_without_generation_has_the_decisions_of_one_with_it_and_no_word_of_a_call(
    model, plain, tmp_path, monkeypatch
):
    steps = []
    monkeypatch.setattr("probe.model.hooked.Model.step", lambda *_, **__: steps.append(1))
    run = probe.run(
        LINES,
        model=model,
        out=tmp_path / "run",
        capture="all",
        generator="none",
        reasoning="reference",
        batch_size=4,
    )
    assert not steps
    for task in list(plain)[:3]:
        was, now = task.record, run[task.id].record
        alike(now["tool_probabilities"], was["tool_probabilities"])
        assert (now["score"], now["n_new"], now["finish_reason"]) == (was["score"], 1, "prefill")
        assert not {"called", "call", "call_error"} & now.keys()
        now, was = run[task.id]["resid_post"].float(), task["resid_post"][:, :1].float()
        assert relative(now, was) <= PARITY
    reasoned = run["c1"].record
    assert reasoned["answer"] is None and reasoned["steps"] == ["3 and 4 are 7."] and "score" not in reasoned
    assert [p["chosen"] for p in passages(run["p1"].record)] == [
        p["chosen"] for p in passages(plain["p1"].record)
    ]
    names = {*run.measures().name}
    assert "accuracy" in names and not {"call_accuracy", "call_agreement"} & names


def test_what_a_generator_cannot_have_is_refused_with_the_reason(model, tmp_path):
    agent = {"id": "a", "kind": "agent", "messages": LINES[0]["messages"], "tools": ["calculator"]}
    for lines, given, told in (
        ([agent], {"generator": "transformers"}, "between its turns tools are called"),
        (LINES, {"generator": "none"}, "take --reasoning reference"),
        (LINES, {"generator": "none", "temperature": 1.0}, "--temperature with --generator none"),
        (LINES, {"generator": "vllm"}, "give --generator-url"),
        (LINES, {"generator": "vllm", "generator_url": "file:///etc/passwd"}, "write http://HOST:PORT"),
        (
            LINES,
            {"generator": "vllm", "generator_url": "http://me:key@host"},
            "without user, password and query",
        ),
        (LINES, {"generator": "vllm", "generator_url": "http://host/?api_key=k"}, "password and query"),
        (LINES, {"generator": "vllm", "generator_url": "http://[::1"}, "no address of a server"),
        (LINES, {"generator": "vllm", "generator_url": "http://host:x"}, "no address of a server"),
        (LINES, {"generator_url": "http://x"}, "is for --generator vllm"),
        (LINES, {"generator": "llama"}, "one of probe, vllm"),
    ):
        with pytest.raises(UsageError, match=told):
            probe.run(lines, model=model, out=tmp_path / "run", **given)


def test_penalties_and_stops_of_the_models_own_configuration_are_left_out(model, monkeypatch):
    """`generate` of transformers fills in what it is not given from there."""
    ids = list(range(5, 25))
    plain = generate_tokens(model, ids, 12, [])
    penalised = GenerationConfig(repetition_penalty=5.0, eos_token_id=plain[0][0])
    monkeypatch.setattr(model.hf, "generation_config", penalised)
    assert generate_tokens(model, ids, 12, []) == plain
    assert len(plain[0]) == 12 and model.hf.generation_config is penalised


def test_a_key_that_a_header_cannot_have_is_refused_and_not_printed(server, monkeypatch):
    choices = generators_options(generator="vllm", generator_url=server.url)
    monkeypatch.setenv(generators.KEY, "sk-se\r\ncret")
    with pytest.raises(UsageError, match=generators.KEY) as caught:
        generators.VllmGenerator(choices)
    assert "cret" not in str(caught.value)
    monkeypatch.setenv(generators.KEY, "sk-secret\r\n")
    generators.VllmGenerator(choices)


def test_a_generator_is_asked_for_no_more_than_the_context_holds(model):
    """The token behind the last position is emitted and never run."""
    codec = copy.copy(model.codec)
    codec.n_ctx = 64
    asked: list[int] = []

    def ask(ids, most, _stops):
        asked.append(most)
        return [GeneratedToken(40, -1.0)] * most

    job = with_tokens(Job(prompt_of_tokens(list(range(5, 55)), codec), "t"), codec, 100, ask)
    assert isinstance(job.controller, GivenTokens)
    n_prompt = job.controller.driven.prompt.n_prompt
    assert asked == [64 + 1 - n_prompt]
    assert job.controller.tokens.finish_reason == "length" and len(job.prompt.token_ids) == 64


def test_a_server_is_asked_for_no_token_behind_its_context(model, server):
    """vLLM refuses a request whose prompt and tokens are more than its context; a run of its own emits one more."""
    codec = copy.copy(model.codec)
    codec.n_ctx = 64
    choices = generators_options(generator="vllm", generator_url=server.url)
    ends: dict[bool, Job] = {}
    for generator in (generators.VllmGenerator(choices), generators.TransformersGenerator(model, choices)):
        source = generators.TokenSource(generator, codec, choices)
        job = Job(prompt_of_tokens(list(range(5, 55)), codec), "t")
        ask = generator.tokens
        generator.tokens = lambda ids, most, _stops, seed, ask=ask: ask(ids, most, frozenset(), seed)
        (ends[generator.within],) = source.under(probe.capture.Generation(100))([job])
        source.close()
    (asked,) = server.asked
    assert len(asked["prompt"]) + asked["max_tokens"] == 64
    server_ends, run_ends = (ends[within].controller.tokens for within in (True, False))  # type: ignore[union-attr]
    assert server_ends.finish_reason == run_ends.finish_reason == "length"
    assert run_ends.new_ids[:-1] == server_ends.new_ids


def test_a_run_that_stops_waits_for_no_answer_of_a_server(model, server):
    choices = generators_options(generator="vllm", generator_url=server.url)
    source = generators.TokenSource(generators.VllmGenerator(choices), model.codec, choices)
    with server.one_at_a_time:  # it has the requests, and answers none
        work = [Job(prompt_of_tokens([5, 6, 7 + n], model.codec), f"t{n}") for n in range(20)]
        source.expect(work, probe.capture.Generation(8))
        assert source._threads is not None
        threads = list(source._threads._threads)
        source.close()
        for thread in threads:
            thread.join(20)
        server.model = None  # what it has of them fails: nothing is to be computed when the tests end
        assert len(threads) == 16 and not any(thread.is_alive() for thread in threads)
