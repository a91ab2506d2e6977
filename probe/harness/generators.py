"""Where the tokens of a run come from: the run itself, or a generator before it, whose tokens one prefill then runs.

`vllm` asks a server with vLLM's completions interface: token ids go in and come out, with log-probabilities. `transformers` is
the library's own `generate`, an oracle of the run's. `none` generates nothing. Source of the fields:
vllm/entrypoints/openai/completion/protocol.py (`CompletionRequest`, `CompletionResponseChoice`).
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from probe.capture.given import GeneratedToken, given, prefill_only
from probe.errors import ModelUnavailable, RunDirectoryError, UsageError
from probe.jsontext import StrictJsonError, kind_of, loads, printable

if TYPE_CHECKING:
    from probe.capture import Generation, Job
    from probe.capture.edits import Steering
    from probe.model.hooked import Model
    from probe.prompts import Codec, Prompt
    from probe.tasks import Task

OWN, VLLM, TRANSFORMERS, NONE = "probe", "vllm", "transformers", "none"
GENERATORS = (OWN, VLLM, TRANSFORMERS, NONE)
KEY = "VLLM_API_KEY"
"""Environment variable of the key that a server asks for, where it asks for one."""
_REQUESTS = 16
"""Requests that a server has at a time: it batches them itself."""
_SECONDS = 600
"""How long a server may take for one answer."""
_MOST_BYTES = 1 << 26
"""Most bytes of one answer."""


class GeneratorOptions(Protocol):
    """The options of a run that a generator goes by (`probe.harness.plan.Options`)."""

    @property
    def generator(self) -> str: ...
    @property
    def generator_url(self) -> str | None: ...
    @property
    def generator_model(self) -> str | None: ...
    @property
    def model(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def max_new_tokens(self) -> int | None: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...


class Generator(Protocol):
    """What chooses the tokens of a run."""

    requests: int
    """How many continuations it takes at a time; 0: one, when its batch is due."""
    within: bool
    """Whether prompt and continuation must lie within the context: without, one token lies behind its last position."""

    def describe(self) -> dict[str, Any]:
        """What run.json keeps of it, and a resumed run has to find again."""
        ...

    def tokens(
        self, token_ids: Sequence[int], most: int, stop_ids: frozenset[int], seed: int
    ) -> Sequence[GeneratedToken]: ...

    def cancel(self) -> None:
        """Give up what it was asked for and has not answered: `tokens` raises then."""
        ...


class TransformersGenerator:
    """`generate` of transformers, with the model at hand."""

    requests, within = 0, False

    def __init__(self, model: Model, choices: GeneratorOptions):
        self._model, self._choices = model, choices

    def describe(self) -> dict[str, Any]:
        return {"name": TRANSFORMERS}

    def tokens(
        self, token_ids: Sequence[int], most: int, stop_ids: frozenset[int], seed: int
    ) -> list[GeneratedToken]:
        from probe.model.generation import generate_tokens

        c = self._choices
        new_ids, log_probs = generate_tokens(
            self._model,
            token_ids,
            most,
            stop_ids,
            temperature=c.temperature,
            top_p=c.top_p,
            top_k=c.top_k,
            seed=seed,
        )
        return [GeneratedToken(*pair) for pair in zip(new_ids, log_probs, strict=True)]

    def cancel(self) -> None:
        """Nothing: it is asked between two batches, and nothing waits."""


class _SamePlace(urllib.request.HTTPRedirectHandler):
    """Follows nothing: an answer from elsewhere is not the server that was named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Connections:
    """The connections of requests; when they are cut, those that wait for an answer fail, and the server sees that nobody waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self.cut_off = False

    def add(self, connected: socket.socket) -> None:
        with self._lock:
            self._sockets = {each for each in self._sockets if each.fileno() >= 0} | {connected}
            if self.cut_off:
                _shut(connected)

    def cut(self) -> None:
        with self._lock:
            self.cut_off = True
            for connected in self._sockets:
                _shut(connected)

    def handlers(self) -> list[urllib.request.BaseHandler]:
        """What opens URLs over connections that are added here."""
        connections = self

        class Plain(http.client.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                connections.add(self.sock)

        class Secure(http.client.HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                connections.add(self.sock)

        class PlainHandler(urllib.request.HTTPHandler):
            def http_open(self, req: urllib.request.Request) -> Any:
                return self.do_open(Plain, req)  # type: ignore[arg-type]

        class SecureHandler(urllib.request.HTTPSHandler):
            def https_open(self, req: urllib.request.Request) -> Any:
                return self.do_open(Secure, req)  # type: ignore[arg-type]

        return [PlainHandler(), SecureHandler()]


def _shut(connected: socket.socket) -> None:
    with suppress(OSError):  # it may have ended
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


class VllmGenerator:
    """A server with vLLM's completions interface."""

    requests, within = _REQUESTS, True

    def __init__(self, choices: GeneratorOptions):
        """Raises ModelUnavailable where no server answers, UsageError where it serves several models and none is named."""
        assert choices.generator_url is not None
        self._choices = choices
        self._url = choices.generator_url.rstrip("/").removesuffix("/v1")
        self._connections = _Connections()
        self._open = urllib.request.build_opener(_SamePlace, *self._connections.handlers()).open
        self._model = self._chosen(self._ask("/v1/models", None))

    def describe(self) -> dict[str, Any]:
        return {"name": VLLM, "url": self._url, "model": self._model}

    def tokens(
        self, token_ids: Sequence[int], most: int, stop_ids: frozenset[int], seed: int
    ) -> list[GeneratedToken]:
        c = self._choices
        drawn = {"top_p": c.top_p, "top_k": c.top_k, "seed": seed} if c.temperature else {}
        request = {
            "model": self._model,
            "prompt": list(token_ids),
            "max_tokens": most,
            "temperature": c.temperature,
            "stop_token_ids": sorted(stop_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
        } | {name: value for name, value in drawn.items() if value is not None}
        return generated_tokens(self._ask("/v1/completions", request))

    def cancel(self) -> None:
        """Close the connections of requests that wait: vLLM ends a request whose client has gone."""
        self._connections.cut()

    def _ask(self, path: str, request: Mapping[str, Any] | None) -> Any:
        data = None if request is None else json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY, "").strip():
            if not (key.isascii() and key.isprintable()):  # an error of the library would print it
                raise UsageError(f"{KEY} is no key: it has characters that a header cannot have")
            headers["Authorization"] = f"Bearer {key}"
        try:
            with self._open(
                urllib.request.Request(self._url + path, data, headers), timeout=_SECONDS
            ) as answer:
                text = answer.read(_MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            told = printable(error.read(500).decode(errors="replace"))
            what = f"{self._url}{path} answers {error.code} {error.reason}: {told}"
            if error.code in (400, 413, 422):  # of this prompt, and of no other
                raise ValueError(what) from None
            fix = f": set {KEY}" if error.code in (401, 403) else ""
            raise ModelUnavailable(what + fix) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = getattr(error, "reason", None) or error
            raise ModelUnavailable(
                f"{self._url} does not answer ({why}): start it with `vllm serve MODEL`, or correct --generator-url"
            ) from None
        if len(text) > _MOST_BYTES:
            raise ModelUnavailable(f"{self._url}{path} answers with more than {_MOST_BYTES:,} bytes")
        try:
            return loads(text.decode())
        except (StrictJsonError, UnicodeDecodeError) as error:
            raise ModelUnavailable(f"{self._url}{path} answers with no JSON: {error}") from None

    def _chosen(self, answer: Any) -> str:
        entries = answer.get("data") if isinstance(answer, dict) else None
        listed = entries if isinstance(entries, list) else []
        served = [entry.get("id") for entry in listed if isinstance(entry, dict)]
        names = [name for name in served if isinstance(name, str)]
        wanted = self._choices.generator_model or (self._choices.model if len(names) != 1 else names[0])
        if wanted not in names:
            shown = ", ".join(map(printable, names)) or "none"
            raise UsageError(f"--generator-model {wanted}: {self._url} serves {shown}: name one of these")
        return wanted


def generated_tokens(answer: Any) -> list[GeneratedToken]:
    """The tokens of an answer of `/v1/completions` that was asked for `return_token_ids` and `logprobs`.

    Raises ModelUnavailable where it has no token ids.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise ModelUnavailable(f"the server's answer has no choices: {kind_of(answer)}")
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise ModelUnavailable(
            "the server's answer has no token ids: it does not know `return_token_ids`; take vLLM 0.11 or newer"
        )
    told = choice.get("logprobs")
    listed = told.get("token_logprobs") if isinstance(told, dict) else None
    log_probs = listed if isinstance(listed, list) and len(listed) == len(ids) else [None] * len(ids)
    return [
        GeneratedToken(token, float(value) if isinstance(value, int | float) and value <= 0 else None)
        for token, value in zip(ids, log_probs, strict=True)
    ]


# -- in a run ------------------------------------------------------------------------------------------------------


def check_options(choices: GeneratorOptions) -> None:
    """Raises UsageError for options that do not go together with where the tokens come from."""
    name = choices.generator
    if name not in GENERATORS:
        raise UsageError(f"--generator {name}: one of {', '.join(GENERATORS)}")
    if name == VLLM:
        if not choices.generator_url:
            raise UsageError(
                "--generator vllm: give --generator-url, as in --generator-url http://localhost:8000"
            )
        try:
            parts = urlsplit(choices.generator_url)
            known = parts.scheme in ("http", "https") and parts.port != 0
        except ValueError:  # of a port or a bracket
            known, parts = False, urlsplit("")
        if not known:
            raise UsageError("--generator-url: no address of a server: write http://HOST:PORT")
        if "@" in parts.netloc or parts.query or parts.fragment:  # the run's record keeps the URL
            raise UsageError(f"--generator-url: write it without user, password and query, and set {KEY}")
    elif choices.generator_url or choices.generator_model:
        given = "--generator-url" if choices.generator_url else "--generator-model"
        raise UsageError(f"{given} is for --generator vllm")
    if name == NONE:
        drawn = ("temperature", "top_p", "top_k", "max_new_tokens")
        for option in drawn:
            if getattr(choices, option):
                raise UsageError(f"--{option.replace('_', '-')} with --generator none: nothing is generated")


def refuse_edits(edits: Sequence[Steering], choices: GeneratorOptions) -> None:
    """Raises UsageError for edits that a generator does not know."""
    name = choices.generator
    if edits and name in (VLLM, TRANSFORMERS):
        raise UsageError(
            f"--edit with --generator {name}: it runs the model without the edits; leave --generator out"
        )


def refuse_misfit(
    task: Task, prompts: Sequence[Prompt], jobs: Sequence[Job], choices: GeneratorOptions
) -> None:
    """Raises UsageError for a task whose tokens cannot come from the generator."""
    from probe.capture import Reasoning
    from probe.capture.replay import Replay
    from probe.capture.transcript import Transcript

    name = choices.generator
    if name == OWN:
        return
    what = f"--generator {name}: task {task.id!r} is of the kind {task.kind}"
    transcripts = [job.controller for job in jobs if isinstance(job.controller, Transcript)]
    if not all(isinstance(transcript, Replay) for transcript in transcripts):
        raise UsageError(
            f"{what}: between its turns tools are called; run it without, or import the server's log as `replay` tasks"
        )
    if transcripts and name != NONE:
        raise UsageError(f"{what}: its tokens are given, and nothing is to be generated")
    reasons = any(isinstance(job.controller, Reasoning) for job in jobs)
    if name == NONE and reasons and any(prompt.forced_steps == 0 for prompt in prompts):
        raise UsageError(
            f"{what}, and no reasoning is given: take --reasoning reference, and tasks with steps"
        )


def without_tokens(jobs: Sequence[Job], choices: GeneratorOptions) -> list[Job]:
    """The jobs as they are planned: where nothing is generated, those of transcripts have their tokens and the others none."""
    from probe.capture.transcript import Transcript

    if choices.generator != NONE:
        return list(jobs)
    return [job if isinstance(job.controller, Transcript) else prefill_only(job) for job in jobs]


def open_generator(choices: GeneratorOptions, model: Model) -> Generator | None:
    """What generates in place of the run itself; None: it does, or nothing is generated. Raises as the generators do."""
    if choices.generator == VLLM:
        return VllmGenerator(choices)
    return TransformersGenerator(model, choices) if choices.generator == TRANSFORMERS else None


def refuse_other_generator(saved: Mapping[str, Any], generator: Generator | None) -> None:
    """Raises RunDirectoryError where a resumed run would have its tokens from another model than it began with."""
    if generator is not None and saved.get("generator") != generator.describe():
        raise RunDirectoryError(
            f"the run began with the tokens of {saved.get('generator')}, and there is {generator.describe()}: start a new run"
        )


class TokenSource:
    """Gives the jobs of a run their tokens; asks for as many at a time as the generator takes."""

    def __init__(self, generator: Generator | None, codec: Codec, choices: GeneratorOptions):
        self._generator, self._codec, self._choices = generator, codec, choices
        workers = generator.requests if generator is not None else 0
        self._threads = ThreadPoolExecutor(workers) if workers else None
        self._asked: dict[int, Future[Job]] = {}
        self._ready: dict[int, Job] = {}
        self._apart: list[str] = []

    def expect(self, jobs: Iterable[Job], generation: Generation) -> None:
        """These jobs will be wanted, in this order."""
        for job in jobs:
            if self._threads is not None and id(job) not in self._asked and id(job) not in self._ready:
                self._asked[id(job)] = self._threads.submit(self._given, job, generation.max_new_tokens)

    def under(self, generation: Generation) -> Callable[[Sequence[Job]], list[Job]]:
        """What gives jobs their tokens, as they are to be run; it raises what the generator raises."""

        def tokens(jobs: Sequence[Job]) -> list[Job]:
            self.expect(jobs, generation)
            return [self._job(job, generation.max_new_tokens) for job in jobs]

        return tokens

    def _job(self, job: Job, limit: int) -> Job:
        if self._generator is None:
            return job
        if id(job) not in self._ready:
            asked = self._asked.pop(id(job), None)
            self._ready[id(job)] = self._given(job, limit) if asked is None else asked.result()
        return self._ready[id(job)]

    def _given(self, job: Job, limit: int) -> Job:
        from probe.capture.sequence import generator_of

        assert self._generator is not None
        seed, tokens = generator_of(self._choices.seed, job).initial_seed(), self._generator.tokens
        return given(
            job,
            self._codec,
            limit,
            lambda ids, most, stops: tokens(ids, most, stops, seed),
            within=self._generator.within,
        )

    def watch(self, record: Mapping[str, Any]) -> None:
        """Note whether the model at hand is another than the one that generated a passage of this record."""
        passages = record.get("passages", {"main": record}).values()
        if self._generator is not None and any(
            (passage.get("replay_agreement") or {}).get("disagrees") for passage in passages
        ):
            self._apart.append(str(record["id"]))

    def told_apart(self) -> str | None:
        """What to say of the records that were watched; None: nothing."""
        if not self._apart:
            return None
        named = ", ".join(map(printable, self._apart[:3])) + ", …" * (len(self._apart) > 3)
        return (
            f"{len(self._apart)} tasks ({named}): the generator runs another model than the one at hand "
            "(replay_agreement in their records)"
        )

    def close(self) -> None:
        """Ask for nothing more, and wait for nothing that was asked: threads that wait would hold up the program's end."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        if self._generator is not None:
            self._generator.cancel()
