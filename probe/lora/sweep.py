"""What a rank buys: one training for each rank, rate and seed, kept as one file each, so that a sweep continues.

The task is a small invented language (`tarn/`): requests in English and their translation by rules, with words,
endings and orders that no text has. Training, selection and validation lines are disjoint; the text of
`text.jsonl` has nothing to do with it, and what happens to the model there is forgetting.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import RunDirectoryError, UsageError
from probe.lora.spectrum import of_factors, of_values

if TYPE_CHECKING:
    from probe.model.tuning import Example, Tuning
    from probe.prompts import Codec

Log = Callable[[str], None]
FULL = "full"
"""The name of training every weight, beside the ranks."""


@dataclass(frozen=True)
class Settings:
    """What decides a sweep; kept beside its trainings and compared when it is continued."""

    model: str = "smollm2-135m"
    ranks: tuple[int | str, ...] = (1, 2, 4, 8, 16, 64, FULL)
    seeds: int = 3
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Of LoRA, tried with the first seed; the one with the lowest selection loss is used for all."""
    full_rates: tuple[float, ...] = (1e-5, 5e-5, 2e-4)
    steps: int = 160
    batch: int = 16
    looks: int = 10
    """How often a training is measured after its start."""
    lines: int = 256
    """Training lines used."""
    held_out: int = 96
    """Validation lines used."""
    texts: int = 36
    quick: bool = False

    @classmethod
    def quickly(cls, **changed: Any) -> Settings:
        """A sweep of minutes: three ranks, one seed, 64 training lines seen ten times."""
        given = {
            "ranks": (1, 4, 64, FULL),
            "seeds": 1,
            "rates": (1e-3, 3e-3),
            "full_rates": (5e-5, 2e-4),
            "steps": 40,
            "looks": 4,
            "lines": 64,
            "held_out": 48,
            "texts": 12,
            "quick": True,
        }
        return cls(**given | changed)

    def __post_init__(self) -> None:
        if not self.ranks or any(
            rank != FULL and (not isinstance(rank, int) or rank < 1) for rank in self.ranks
        ):
            raise UsageError("--ranks: whole numbers from 1 on, and `full`, with commas between")
        if self.seeds < 1 or self.steps < 1:
            raise UsageError("--seeds and --steps: at least 1")

    def tried(self, rank: int | str) -> tuple[float, ...]:
        return self.full_rates if rank == FULL else self.rates


@dataclass(frozen=True)
class Lines:
    """Token ids of everything a sweep reads."""

    train: list[Example]
    selection: list[Example]
    validation: list[Example]
    text: list[Example]


@dataclass
class _Base:
    """The model before: its loss on the text and, block by block, its log-probabilities there."""

    loss: float
    log_probs: list[Any] = field(default_factory=list)


def sweep(
    settings: Settings, out: Path, *, offline: bool = False, log: Log = lambda _: None
) -> dict[str, Any]:
    """Train what is missing and return what was found (`probe.lora.findings`); also written to OUT/sweep.json.

    Raises RunDirectoryError where OUT holds a sweep with other settings, ModelUnavailable, UsageError.
    """
    from probe.lora.findings import findings

    _claim(settings, out)
    plan = _Plan(settings, out)
    if plan.missing():
        from probe.model import load
        from probe.prompts import Codec

        log(f"loading {settings.model}")
        model = load(settings.model, offline=offline, log=log)
        lines = read_lines(settings, Codec(model.tokenizer, model.facts.n_ctx))
        _train_all(plan, model.hf, lines, log)
    found = findings(settings, [cell for rank in settings.ranks for cell in plan.chosen(rank)], plan.trials())
    _write(out / "sweep.json", found)
    return found


def read_lines(settings: Settings, codec: Codec) -> Lines:
    """The shipped lines as token ids: position 0 holds the sink, a translation ends in its line break."""

    def ids(given: str, said: str) -> Example:
        head = [codec.sink, *codec.encode(given)]
        return [*head, *codec.encode(said)], len(head)

    def pairs(name: str, most: int | None = None) -> list[Example]:
        return [ids(line["prompt"], line["completion"]) for line in read_data(name)[:most]]

    texts = [ids("", line["text"]) for line in read_data("text")[: settings.texts]]
    return Lines(
        pairs("train", settings.lines), pairs("selection"), pairs("validation", settings.held_out), texts
    )


def read_data(name: str) -> list[dict[str, str]]:
    """`train`, `selection` or `validation` (prompt, completion), or `text` (text)."""
    text = Path(__file__).parent.joinpath("tarn", f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# -- trainings on disk ---------------------------------------------------------------------------------------------


class _Plan:
    """The trainings of a sweep and those that are done."""

    def __init__(self, settings: Settings, out: Path):
        self.settings, self.out = settings, out

    def path(self, rank: int | str, rate: float, seed: int) -> Path:
        return self.out / "trainings" / f"rank-{rank}_rate-{rate:g}_seed-{seed}.json"

    def read(self, rank: int | str, rate: float, seed: int) -> dict[str, Any] | None:
        path = self.path(rank, rate, seed)
        return json.loads(path.read_bytes()) if path.is_file() else None

    def best_rate(self, rank: int | str) -> float | None:
        """The rate with the lowest selection loss at any look, where all were tried."""
        tried = [(rate, self.read(rank, rate, 0)) for rate in self.settings.tried(rank)]
        losses = [
            (min(look["selection_loss"] for look in cell["looks"]), rate) for rate, cell in tried if cell
        ]
        return min(losses)[1] if len(losses) == len(tried) else None

    def missing(self) -> list[tuple[int | str, float, int]]:
        """What is known to be left: further seeds only where the rate is chosen."""
        left = []
        for rank in self.settings.ranks:
            best = self.best_rate(rank)
            wanted = (
                [(rank, rate, 0) for rate in self.settings.tried(rank)]
                if best is None
                else [(rank, best, seed) for seed in range(self.settings.seeds)]
            )
            left += [key for key in wanted if not self.path(*key).is_file()]
        return left

    def n_left(self) -> int:
        unknown = sum(self.best_rate(rank) is None for rank in self.settings.ranks)
        return len(self.missing()) + unknown * (self.settings.seeds - 1)

    def chosen(self, rank: int | str) -> list[dict[str, Any]]:
        best = self.best_rate(rank)
        assert best is not None
        return [cell for seed in range(self.settings.seeds) if (cell := self.read(rank, best, seed))]

    def trials(self) -> list[dict[str, Any]]:
        """Every rate that was tried, with its lowest selection loss."""
        return [
            {
                "rank": rank,
                "rate": rate,
                "selection_loss": min(look["selection_loss"] for look in cell["looks"]),
            }
            for rank in self.settings.ranks
            for rate in self.settings.tried(rank)
            if (cell := self.read(rank, rate, 0))
        ]


def _claim(settings: Settings, out: Path) -> None:
    own = json.loads(json.dumps(asdict(settings) | {"data_sha256": _data_hash()}))
    path = out / "settings.json"
    if path.is_file():
        kept = json.loads(path.read_bytes())
        if other := sorted(key for key in own if kept.get(key) != own[key]):
            was = ", ".join(f"{key} {kept.get(key)}" for key in other)
            raise RunDirectoryError(f"{out} holds a sweep with other settings ({was}); give another --out")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunDirectoryError(f"{out}: not a sweep and not empty; give another --out")
    (out / "trainings").mkdir(parents=True, exist_ok=True)
    _write(path, own)


def _data_hash() -> str:
    names = ("train", "selection", "validation", "text")
    return hashlib.sha256(json.dumps([read_data(name) for name in names]).encode()).hexdigest()


def _write(path: Path, document: dict[str, Any]) -> None:
    from probe.store.export import write_file

    write_file(path, (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode())


# -- one training --------------------------------------------------------------------------------------------------


def _train_all(plan: _Plan, hf: Any, lines: Lines, log: Log) -> None:
    base = _before(hf, lines.text)
    began, made = time.monotonic(), 0
    while left := plan.missing():
        rank, rate, seed = left[0]
        cell = _train(plan, hf, lines, base, rank, rate, seed)
        _write(plan.path(rank, rate, seed), cell)
        made += 1
        last, rest = cell["looks"][-1], plan.n_left()
        minutes = (time.monotonic() - began) / made * rest / 60
        log(
            f"{_named(rank)}, rate {rate:g}, seed {seed}: training {last['train_loss']:.3f}, "
            f"validation {last['validation_loss']:.3f}, KL on text {last['text_kl']:.3f} nats a token; "
            f"{rest} trainings left, about {minutes:.0f} min"
        )


def _named(rank: int | str) -> str:
    return "all weights" if rank == FULL else f"rank {rank}"


def _train(
    plan: _Plan, hf: Any, lines: Lines, base: _Base, rank: int | str, rate: float, seed: int
) -> dict[str, Any]:
    from probe.model.tuning import Tuning

    settings, began = plan.settings, time.monotonic()
    tuning = Tuning(
        hf,
        rank=None if rank == FULL else int(rank),
        rate=rate,
        steps=settings.steps,
        batch=min(settings.batch, len(lines.train)),
        seed=seed,
    )
    stops = sorted({round(settings.steps * (k + 1) / settings.looks) for k in range(settings.looks)} - {0})
    looks = [_look(tuning, lines, base)]
    for stop in stops:
        tuning.advance(lines.train, stop)
        looks.append(_look(tuning, lines, base))
        if not math.isfinite(looks[-1]["train_loss"]):
            break
    cell: dict[str, Any] = {
        "rank": rank,
        "rate": rate,
        "seed": seed,
        "n_trained": tuning.n_trained,
        "base_text_loss": base.loss,
        "looks": looks,
        "spectra": list(_spectra(tuning)),
        "seconds": round(time.monotonic() - began, 1),
    }
    tuning.save(plan.out / "adapters" / plan.path(rank, rate, seed).stem)
    return cell


def _look(tuning: Tuning, lines: Lines, base: _Base) -> dict[str, Any]:
    """Losses in nats a token, on as many training lines as there are of validation."""
    loss, kl = _text(tuning, lines.text, base)
    return {
        "step": tuning.step,
        "train_loss": _loss(tuning.log_probs(lines.train[: len(lines.validation)])),
        "selection_loss": _loss(tuning.log_probs(lines.selection)),
        "validation_loss": _loss(tuning.log_probs(lines.validation)),
        "text_loss": loss,
        "text_kl": kl,
        "change": tuning.change(),
    }


def _loss(blocks: Iterator[tuple[Any, Any]]) -> float:
    total, count = 0.0, 0
    for log_probs, tokens in blocks:
        total -= float(log_probs.gather(1, tokens[:, None]).double().sum())
        count += len(tokens)
    return total / count


def _before(hf: Any, text: Sequence[Example]) -> _Base:
    from probe.model.tuning import log_probs

    kept = list(log_probs(hf, text))
    return _Base(_loss(iter(kept)), [own for own, _ in kept])


def _text(tuning: Tuning, text: Sequence[Example], base: _Base) -> tuple[float, float]:
    """Loss, and KL(base‖tuned) over the whole vocabulary, nats a token."""
    kept, divergence, count = [], 0.0, 0
    for (log_probs, tokens), before in zip(tuning.log_probs(text), base.log_probs, strict=True):
        divergence += float((before.exp() * (before - log_probs)).sum(-1).double().sum())
        count += len(tokens)
        kept.append((log_probs, tokens))
    return _loss(iter(kept)), divergence / count


def _spectra(tuning: Tuning) -> Iterator[dict[str, Any]]:
    """Numbers of every ΔW: from its factors, or of the dense matrix where every weight was trained."""
    import torch

    found = [(name, of_factors(a, b, scale)) for name, a, b, scale in tuning.factors()]
    for name, delta in tuning.differences():
        tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
        # Of the Gram matrix in float64: σ below 10⁻⁸ σ₁ are lost, which no number here can see.
        sigma = torch.linalg.eigvalsh(tall.T @ tall).flip(0).clamp_min(0).sqrt()
        found.append((name, of_values(sigma, min(delta.shape), tuple(delta.shape))))
    for name, one in found:
        keys = ("nuclear_norm", "frobenius_norm", "spectral_norm", "stable_rank", "effective_rank")
        yield {"module": name, "cauchy_schwarz_ratio": one.cauchy_schwarz_ratio} | {
            key: getattr(one, key) for key in keys
        }
