"""`probe lora sweep`: the same training at every rank, rate and seed; one file a finished training.

Rates are chosen on the first seed by the loss on selection lines; all other seeds run at the chosen rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import ArtifactCorrupt, BadInput, UsageError
from probe.runs.cells import cell_folder, read_signed, settle, write_signed
from probe.training.lora.data import TextData, read_texts

if TYPE_CHECKING:
    from probe.training.trainee import Rows, Trainee

FULL = "full"
"""The method beside the ranks: the matrices themselves are trained."""


@dataclass(frozen=True)
class SweepSetting:
    """What a sweep trains. Ranks, seeds and rates say which trainings there are; all else, what each one is."""

    model: str = "smollm2-135m"
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    full: bool = True
    seeds: int = 3
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates of adapters."""
    full_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    steps: int = 400
    batch: int = 8
    points: int = 16
    """Measurements along a training, the first before it."""
    train_lines: int = 256
    held_out_lines: int = 96
    text_lines: int = 36
    text_tokens: int = 64
    alpha_per_rank: float = 2.0
    """The scale of B A at every rank, alpha / r (Biderman et al. 2024, §4: alpha = 2 r)."""
    layers: int = 6
    """Layers, evenly spaced, whose spectra are taken."""
    quick: bool = False

    def quickened(self) -> SweepSetting:
        """A look in minutes: fewer and shorter of everything, never a result."""
        return replace(
            self,
            ranks=(4, 64),
            rates=(1e-3, 3e-3),
            full_rates=(1e-4, 3e-4),
            steps=12,
            points=5,
            train_lines=24,
            held_out_lines=16,
            text_lines=8,
            text_tokens=32,
            layers=1,
            quick=True,
        )

    def checked(self) -> SweepSetting:
        """Raises UsageError for what cannot be trained."""
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) != len(self.ranks):
            raise UsageError(
                f"--ranks {','.join(map(str, self.ranks))}: give different whole numbers above 0, as 1,4,64"
            )
        rates = (*self.rates, *self.full_rates)
        if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise UsageError("learning rates are numbers above 0, as 3e-4,1e-3")
        if min(self.seeds, self.steps, self.batch, self.points - 1, self.layers) < 1:
            raise UsageError("--seeds, --steps and --batch-size are whole numbers above 0")
        return self

    def methods(self) -> list[str]:
        """Ranks ascending, then full fine-tuning."""
        return [f"r{rank}" for rank in sorted(self.ranks)] + ([FULL] if self.full else [])

    def rates_of(self, method: str) -> tuple[float, ...]:
        return self.full_rates if method == FULL else self.rates

    def when(self) -> list[int]:
        """Steps that are measured: dense at the start, where a training moves fastest."""
        last = self.points - 1
        return sorted({round(self.steps * (index / last) ** 1.5) for index in range(self.points)})


@dataclass(frozen=True)
class Cell:
    """One training."""

    method: str
    """`r4`, …, or `full`."""
    rate: float
    seed: int

    @property
    def rank(self) -> int | None:
        return None if self.method == FULL else int(self.method[1:])

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.rate:g}-seed{self.seed}"


class Sweep:
    """A directory of finished trainings: `sweep.json` (what each is) and `cells/*.json`, each with its own checksum."""

    def __init__(self, path: Path, setting: SweepSetting):
        self.path, self.setting = path, setting.checked()
        self.trainings: dict[Cell, dict[str, Any]] = {}

    def locked(self) -> AbstractContextManager[None]:
        """Only one process adds trainings. Raises RunDirectoryError (another is at work, or this is no sweep), DiskError."""
        return cell_folder(self.path, "cells", "-o")

    def begin(self, identity: dict[str, Any]) -> None:
        """Take up what is finished. Raises RunDirectoryError where another setting made it, ArtifactCorrupt."""
        settle(self.path, {**_of_a_cell(self.setting), **identity}, "-o")
        for path in sorted((self.path / "cells").glob("*.json")):
            entry = read_signed(path)
            try:
                cell = Cell(**entry["cell"])
                _ = entry["points"][0]["validation_loss"], entry["spectra"]
            except (KeyError, TypeError, IndexError) as error:
                raise ArtifactCorrupt(
                    f"{path}: is no finished training; remove it to run it again"
                ) from error
            self.trainings[cell] = entry

    def keep(self, cell: Cell, entry: dict[str, Any]) -> None:
        write_signed(self.path / "cells" / f"{cell.name}.json", entry)
        self.trainings[cell] = entry

    def chosen(self, method: str) -> float | None:
        """The rate with the smallest selection loss that the first seed ever had; None until all have run."""
        cells = [Cell(method, rate, 0) for rate in self.setting.rates_of(method)]
        if not all(cell in self.trainings for cell in cells):
            return None
        return min(
            cells, key=lambda cell: min(p["selection_loss"] for p in self.trainings[cell]["points"])
        ).rate

    def cells(self) -> Iterator[Cell]:
        """All trainings, in order; what the later seeds run at is known when the first seed's are finished."""
        for seed in range(self.setting.seeds):
            for method in self.setting.methods():
                if seed == 0:
                    yield from (Cell(method, rate, 0) for rate in self.setting.rates_of(method))
                elif (rate := self.chosen(method)) is not None:
                    yield Cell(method, rate, seed)

    def total(self) -> int:
        setting = self.setting
        return sum(len(setting.rates_of(method)) + setting.seeds - 1 for method in setting.methods())

    def finished(self, method: str) -> list[dict[str, Any]]:
        """The trainings at the chosen rate, by seed."""
        rate = self.chosen(method)
        if rate is None:
            return []
        cells = [Cell(method, rate, seed) for seed in range(self.setting.seeds)]
        return [self.trainings[cell] for cell in cells if cell in self.trainings]


def _of_a_cell(setting: SweepSetting) -> dict[str, Any]:
    which = ("ranks", "full", "seeds", "rates", "full_rates")
    return {key: value for key, value in asdict(setting).items() if key not in which}


def run_sweep(
    path: Path,
    setting: SweepSetting,
    *,
    data: Path | None = None,
    offline: bool = False,
    log: Callable[[str], None] = lambda message: None,
    watch: Callable[[int], AbstractContextManager[Callable[[str], None]]],
) -> Sweep:
    """Run what is missing of a sweep. `watch(total)` gives a function that is called after every training.

    Raises UsageError, BadInput (texts), RunDirectoryError (another setting), ArtifactCorrupt, ModelUnavailable.
    """
    from probe.training.trainee import trainee

    sweep = Sweep(path, setting)
    texts = read_texts(data).first(setting.train_lines, setting.held_out_lines, setting.text_lines)
    with sweep.locked():
        model, tokenizer, identity = trainee(setting.model, offline=offline, log=log)
        sweep.begin({"texts": texts.digest(), "weights_hash": identity["weights_hash"]})
        laboratory = Laboratory(model, encoded(texts, tokenizer, setting.text_tokens), setting)
        with watch(sweep.total()) as done:
            for cell in sweep.cells():
                if cell not in sweep.trainings:
                    sweep.keep(cell, laboratory.run(cell))
                last = sweep.trainings[cell]["points"][-1]
                done(
                    f"{cell.name}: validation {last['validation_loss']:.3f}, KL {last['base_kl']:.4f} nats/token"
                )
    return sweep


def encoded(texts: TextData, tokenizer: Any, text_tokens: int) -> dict[str, Rows]:
    """Token rows of each part; in lines the completion is predicted, in text every token but the first."""
    from probe.prompts import Codec
    from probe.training.trainee import rows_of

    codec = Codec(tokenizer, 1 << 30)
    rows = {}
    for part in ("train", "selection", "validation"):
        pairs = [
            (codec.encode(prompt), codec.encode(completion)) for prompt, completion in getattr(texts, part)
        ]
        rows[part] = rows_of([(prompt + completion, len(prompt)) for prompt, completion in pairs])
    tokens = [codec.encode(text)[:text_tokens] for text in texts.text]
    if min(map(len, tokens)) < 2:
        raise BadInput(["text.jsonl: a text of one token predicts nothing: leave it out"])
    rows["text"] = rows_of([(ids, 1) for ids in tokens])
    return rows


class Laboratory:
    """One model and its texts, in which cells are trained one after another."""

    def __init__(self, model: Trainee, rows: dict[str, Rows], setting: SweepSetting):
        self.model, self.rows, self.setting = model, rows, setting
        self.reference = model.log_probs(rows["text"])
        self.text_loss = model.loss(rows["text"])
        held_out = len(rows["validation"])
        self.trained_on = rows["train"].take(slice(0, held_out))
        """Training lines on which the training loss is measured: as many as there are validation lines."""
        self._before = self._point(0)
        """The same for every cell: B = 0, or ΔW = 0."""
        self.modules = spaced(model.targets, setting.layers)
        self._vectors: dict[str, Any] = {}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train one cell and measure it along the way; the model is afterwards what it was."""
        started, points, when = time.monotonic(), [], set(self.setting.when())

        def at(step: int) -> bool:
            if step not in when:
                return True
            point = self._point(step) if step else self._before
            if all(math.isfinite(value) for value in point.values()):
                points.append(point)
                return True
            return False

        alpha = self.setting.alpha_per_rank * (cell.rank or 0)
        with self.model.opened(cell.rank, alpha, cell.seed) as parameters:
            choices = {"steps": self.setting.steps, "batch": self.setting.batch, "seed": cell.seed}
            finite = self.model.train(self.rows["train"], parameters, rate=cell.rate, at=at, **choices)
            spectra = self._spectra() if finite and points[-1]["step"] == self.setting.steps else {}
            count = sum(parameter.numel() for parameter in parameters)
        return {
            "cell": asdict(cell),
            "parameters": count,
            "points": points,
            "diverged": not spectra,
            "spectra": spectra,
            "seconds": round(time.monotonic() - started, 2),
        }

    def _point(self, step: int) -> dict[str, float]:
        kl, text_loss = self.model.divergence(self.rows["text"], self.reference)
        return {
            "step": step,
            "train_loss": self.model.loss(self.trained_on),
            "selection_loss": self.model.loss(self.rows["selection"]),
            "validation_loss": self.model.loss(self.rows["validation"]),
            "base_kl": kl,
            "log_perplexity_ratio": text_loss - self.text_loss,
            "frobenius_norm": math.sqrt(sum(self._squared_norm(name) for name in self.model.targets)),
        }

    def _squared_norm(self, name: str) -> float:
        factors = self.model.factors().get(name)
        if factors is None:
            return float(self.model.change(name).square().sum())
        a, b, scale = factors[0].double(), factors[1].double(), factors[2]
        return scale**2 * float(((b.T @ b) * (a @ a.T)).sum())

    def _spectra(self) -> dict[str, Any]:
        """Means over the matrices of some layers, and their singular values."""
        import torch

        from probe.training.lora.base import THRESHOLD, TOP_K, decompose, intruders
        from probe.training.lora.spectrum import of_factors, of_values

        spectra, new = [], []
        for name in self.modules:
            stored, transposed = self.model.stored(name)
            factors = self.model.factors().get(name)
            if factors is None:
                dense = self.model.change(name)
                spectrum = of_values(
                    torch.linalg.svdvals(dense), min(dense.shape), (dense.shape[0], dense.shape[1])
                )
            else:
                a, b, scale = factors[0].double(), factors[1].double(), factors[2]
                spectrum = of_factors(a, b, scale)
                dense = scale * (b @ a)
                dense = dense.T if transposed else dense
            if name not in self._vectors:
                self._vectors[name] = decompose(stored, transposed)
            base = self._vectors[name]
            new.append(intruders(base.weight + dense, base, TOP_K, THRESHOLD)[0])
            spectra.append((name, spectrum))
        return {
            **_means([spectrum for _, spectrum in spectra]),
            "intruder_dimensions": sum(new) / len(new),
            "n_matrices": len(spectra),
            "singular_values": {name: spectrum.singular_values[:64].tolist() for name, spectrum in spectra},
        }


def _means(spectra: list[Any]) -> dict[str, float]:
    keys = ("stable_rank", "effective_rank", "cauchy_schwarz_ratio", "nuclear_norm")
    means = {}
    for key in keys:
        values = [value for spectrum in spectra if (value := getattr(spectrum, key)) is not None]
        if values:
            means[key] = sum(values) / len(values)
    return means


def spaced(targets: list[str], count: int) -> list[str]:
    """The matrices of `count` evenly spaced layers; all where layers cannot be told."""
    import re

    layers = {name: int(match[1]) for name in targets if (match := re.search(r"\.(\d+)\.", name))}
    every = sorted(set(layers.values()))
    if len(every) <= count:
        return targets
    kept = {every[round((index + 0.5) * len(every) / count - 0.5)] for index in range(count)}
    return [name for name, layer in layers.items() if layer in kept]
