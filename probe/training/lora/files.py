"""Reading PEFT's LoRA adapters: every ΔW as its two factors and its scale, whatever the settings.

A file is data of other people: only safetensors are opened, and what cannot be measured as B A is named.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import ArtifactCorrupt, BadInput, UsageError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>A|B)(\.(?!weight$|bias$)[^.]+)?(?P<end>\.weight|\.bias)?"
)
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\..+)?")
_DIAGONAL = re.compile(r"(?P<module>.+)\.lora_diag(\..+)?")
_BASE_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that subtract what B A starts from from the base weights (`LoraLayer.*_init` in PEFT)."""

_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""A module's stacked parameters in the order in which the experts of transformers define them."""
_TYPES: dict[type | tuple[type, ...], tuple[str, ...]] = {
    dict: ("rank_pattern", "alpha_pattern", "use_bdlora"),
    (list, str): ("target_modules", "modules_to_save"),
    list: ("target_parameters",),
    str: ("base_model_name_or_path",),
}
"""JSON types of the settings that are looked into."""


@dataclass
class Delta:
    """One ΔW = scale · B A, as its factors: B [d_out, r], A [r, d_in]; embeddings and convolutions unfolded."""

    module: str
    """Path of the adapted module in the base model; `[e]` behind it is expert e of a stacked parameter."""
    a: Tensor
    b: Tensor
    scale: float
    embedding: bool = False
    magnitude: Tensor | None = None
    """DoRA's learned row norms of W + ΔW."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def layer(self) -> int | None:
        match = re.search(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)(?:\.|$)", self.module)
        return int(match[1]) if match else None


@dataclass
class Adapter:
    """One adapter: its configuration, its ΔW, and what is in the file that is no ΔW."""

    name: str
    path: Path
    config: dict[str, Any]
    deltas: list[Delta]
    others: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)
    """Tensors that are not low-rank: name, shape, what they are."""
    notes: list[str] = field(default_factory=list)

    @property
    def moved_base(self) -> str | None:
        """The initialization that changed the base's weights, so that W + B A is not what the model computes with."""
        init = str(self.config.get("init_lora_weights", True)).lower()
        return init if init.startswith(_BASE_MOVED) else None

    def as_stored(self, module: str) -> bool:
        """Whether ΔW lies as the parameter is stored, also where a module stores its weight [in, out]."""
        named = self.config.get("target_parameters") or ()
        return any(f".{module}.weight".endswith(f".{parameter}") for parameter in named)

    @property
    def base(self) -> str | None:
        return self.config.get("base_model_name_or_path") or None


def read_adapters(path: Path, alpha: float | None = None) -> list[Adapter]:
    """All LoRA adapters at a path: a safetensors file, an adapter directory, or a tree with several.

    `alpha` stands in for a missing adapter_config.json beside a single file (scale alpha / r).
    Raises UsageError (no adapter, pickled weights, unknown scale), BadInput (settings that do not fit the
    tensors) and ArtifactCorrupt.
    """
    if alpha is not None and not math.isfinite(alpha):
        raise UsageError(f"--alpha {alpha:g}: give a number; the scale of B A is alpha / r")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UsageError(_advice(path))
        config = path.parent / CONFIG
        return [_read(path.stem, path, config if config.is_file() else None, alpha)]
    if not path.is_dir():
        raise UsageError(f"{path}: no such adapter; give a directory with {CONFIG}, or a .safetensors file")
    configs = sorted(path.rglob(CONFIG), key=lambda adapters: (len(adapters.parts), adapters))
    if not configs:
        pickles = [name for name in _PICKLES if (path / name).is_file()]
        raise UsageError(_advice(path / pickles[0]) if pickles else f"{path}: no {CONFIG} in it or below it")
    adapters = []
    for config in configs:
        weights = config.parent / WEIGHTS
        if not weights.is_file():
            pickles = [name for name in _PICKLES if (config.parent / name).is_file()]
            raise UsageError(_advice(config.parent / (pickles[0] if pickles else WEIGHTS)))
        name = config.parent.relative_to(path).as_posix()
        adapters.append(_read("default" if name == "." else name, weights, config, alpha))
    return adapters


def _advice(path: Path) -> str:
    if not path.exists():
        return f"{path}: there is no such file beside {CONFIG}"
    return (
        f"{path}: not a safetensors file; pickled weights can run code and are never opened. Where you trust it, "
        "load it with peft and save it again with save_pretrained(…), which writes adapter_model.safetensors"
    )


def _read(name: str, path: Path, config_path: Path | None, alpha: float | None) -> Adapter:
    config = _config(config_path) if config_path else {}
    tensors = _tensors(path)
    adapter = Adapter(name, path, config, [], notes=_caveats(config))
    factors = _sorted_out(tensors, adapter)
    if not config:
        if alpha is None:
            raise UsageError(
                f"{path}: no {CONFIG} beside it, so the scale of B A is unknown; put it there or give --alpha N"
            )
        adapter.notes.append(f"no {CONFIG}: scale taken as alpha / r with alpha = {alpha:g}")
        config = {"lora_alpha": alpha, "r": None}
    elif alpha is not None:
        adapter.notes.append(f"--alpha {alpha:g} is not used: {CONFIG} says the scale")
    parameters = _parameters(path, factors, config)
    for module, parts in factors.items():
        adapter.deltas += _deltas(path, module, parts, config, parameters.get(module, module))
    if not adapter.deltas:
        raise BadInput([f"{path}: no lora_A and lora_B in it"])
    return adapter


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactCorrupt(f"{path}: not readable as JSON: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise BadInput([f"{path}: peft_type: {kind!r} is not LORA: only LoRA adapters are B A"])
    for kinds, keys in _TYPES.items():
        for key in keys:
            if config.get(key) and not isinstance(config[key], kinds):
                raise BadInput([f"{path}: {key}: {config[key]!r} is not what PEFT writes there"])
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactCorrupt(f"{path}: not a readable safetensors file: {error}") from error


def _caveats(config: dict[str, Any]) -> list[str]:
    notes = []
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_MOVED):
        notes.append(
            f"init_lora_weights={init}: training began from B A ≠ 0 taken out of the base weights; what is measured "
            "is B A, not the change against the original base"
        )
    if config.get("kasa_config"):
        notes.append(
            "KaSA cuts the base's r smallest singular directions; B diag A is measured, the cut is not"
        )
    if config.get("use_dora"):
        notes.append(
            "DoRA: spectra are those of the low-rank part B A; with its magnitude the change has full rank "
            "(--base measures its norm)"
        )
    if config.get("monteclora_config"):
        notes.append("MonteCLoRA: the mean B A is measured, without its sampled perturbation")
    if config.get("alora_invocation_tokens"):
        notes.append("activated LoRA: the change acts only behind its invocation tokens")
    if config.get("arrow_config"):
        notes.append("Arrow: a router weighs several adapters by token; this one is measured alone")
    return notes


def _sorted_out(tensors: dict[str, Tensor], adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Tensors by module; what is not part of a B A goes to `others`."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        if match := _FACTOR.fullmatch(name):
            if match["end"] == ".bias":
                adapter.others.append(
                    (name, tuple(tensor.shape), "bias of lora_B: added to the output, no part of ΔW")
                )
                continue
            part = ("embedding_" if match["embedding"] else "") + match["factor"]
            factors.setdefault(match["module"], {})[part] = tensor
        elif match := _MAGNITUDE.fullmatch(name):
            factors.setdefault(match["module"], {})["magnitude"] = tensor
        elif match := _DIAGONAL.fullmatch(name):
            factors.setdefault(match["module"], {})["diagonal"] = tensor
        else:
            adapter.others.append((name, tuple(tensor.shape), _kind(name, adapter.config)))
    return factors


def _kind(name: str, config: dict[str, Any]) -> str:
    saved = config.get("modules_to_save") or []
    if any(part in name.split(".") for part in saved):
        return "saved whole (modules_to_save): replaces the base's, not low-rank"
    if "trainable_tokens" in name or "token_adapter" in name:
        return "rows of an embedding (trainable_token_indices), not low-rank"
    if ".base_layer." in name:
        return "the base's own weight, saved beside its adapter"
    if name.endswith(".bias"):
        return f"bias of the base, trained (bias={config.get('bias')!r})"
    return "not part of any B A"


def _parameters(path: Path, factors: dict[str, dict[str, Tensor]], config: dict[str, Any]) -> dict[str, str]:
    """Module in the file → path of the parameter it adapts, which PEFT's patterns are matched with.

    Where several parameters of a module are adapted, each wraps the one before it in the order of the module's own
    definition, which is in no file: what ranks leave open is taken in transformers' order (`_ORDER`), or refused.
    """
    if not config.get("target_parameters") or not (config.get("rank_pattern") or config.get("alpha_pattern")):
        return {}
    groups: dict[str, list[str]] = {}
    for module in factors:
        groups.setdefault(module.replace(".base_layer", ""), []).append(module)
    parameters = {}
    for plain, wrapped in groups.items():
        names = _targeted(plain, config)
        if len(names) < len(wrapped) or not names:
            continue
        inner_first = sorted(wrapped, key=len, reverse=True)
        rows = [factors[module]["A"].shape[0] if "A" in factors[module] else 0 for module in inner_first]
        fitting = []
        for order in itertools.permutations(names, len(wrapped)):
            scales = [
                _rank_and_scale(f"{plain}.{name}", config, n) for name, n in zip(order, rows, strict=True)
            ]
            stacked = {
                n / r for (r, _), n in zip(scales, rows, strict=True)
            }  # one number of experts a module
            if len(stacked) == 1 and stacked.pop().is_integer():
                fitting.append((order, tuple(scales)))
        usual = [fit for fit in fitting if list(fit[0]) == [name for name in _ORDER if name in fit[0]]]
        if len({scales for _, scales in fitting}) > 1 and len(usual) != 1:
            raise BadInput(
                [
                    f"{path}: {plain}: which of its parameters {', '.join(names)} each factor adapts is not in the "
                    f"file, and the patterns of {CONFIG} give them different ranks or alphas"
                ]
            )
        order = (usual or fitting or [(names, ())])[0][0]
        parameters |= {module: f"{plain}.{name}" for module, name in zip(inner_first, order, strict=False)}
    return parameters


def _targeted(module: str, config: dict[str, Any]) -> list[str]:
    """The module's parameters that `target_parameters` names; none where `target_modules` names the module."""
    modules = config.get("target_modules") or ()
    if isinstance(modules, str):
        if re.fullmatch(modules, module):
            return []
    elif any(f".{module}".endswith(f".{target}") for target in modules):
        return []
    split = (target.rpartition(".") for target in sorted(config["target_parameters"]))
    return list(dict.fromkeys(n for at, _, n in split if not at or f".{module}".endswith(f".{at}")))


def _deltas(
    path: Path, module: str, parts: dict[str, Tensor], config: dict[str, Any], named: str
) -> list[Delta]:
    embedding = "embedding_A" in parts
    a, b = (parts.get(("embedding_" if embedding else "") + factor) for factor in "AB")
    if a is None or b is None:
        raise BadInput(
            [f"{path}: {module}: lora_{'B' if b is None else 'A'} is missing: the file is incomplete"]
        )
    if a.ndim < 2 or b.ndim < 2:
        raise BadInput(
            [f"{path}: {module}: factors of shape {tuple(a.shape)} and {tuple(b.shape)} are no matrices"]
        )
    a, b = a.flatten(1).double(), b.flatten(1).double()
    r, scale = _rank_and_scale(named, config, a.shape[0])
    a, b = _unfolded(a, b, module, config)
    if a.shape[0] != b.shape[1]:
        raise BadInput([f"{path}: {module}: A {tuple(a.shape)} and B {tuple(b.shape)} do not multiply"])
    if not (a.numel() and b.numel()):
        raise BadInput([f"{path}: {module}: A {tuple(a.shape)} and B {tuple(b.shape)} are empty"])
    if not (a.isfinite().all() and b.isfinite().all()):
        raise BadInput([f"{path}: {module}: a factor holds NaN or infinite numbers"])
    if "diagonal" in parts:
        b = b * parts["diagonal"].double()
    if r != a.shape[0]:
        if not config.get("target_parameters") or a.shape[0] % r:
            raise BadInput([f"{path}: {module}: the file has rank {a.shape[0]}, {CONFIG} says {r}"])
        return _experts(module, a, b, r, scale)
    magnitude = parts.get("magnitude")
    return [
        Delta(module, a, b, scale, embedding, None if magnitude is None else magnitude.double().flatten())
    ]


def _rank_and_scale(module: str, config: dict[str, Any], in_file: int) -> tuple[int, float]:
    """Rank and scale by PEFT's rule: the first pattern that matches the end of the module's path wins."""
    plain = module.replace(".base_layer", "")
    r = _by_pattern(config.get("rank_pattern"), plain, config.get("r") or in_file)
    alpha = _by_pattern(config.get("alpha_pattern"), plain, config.get("lora_alpha", 8))
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise BadInput(
            [f"{CONFIG}: {module}: rank {r!r} or alpha {alpha!r} is no number that a scale can be made of"]
        )
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise BadInput([f"{CONFIG}: pattern {pattern!r} is no regular expression: {error}"]) from error
    return default


def _unfolded(a: Tensor, b: Tensor, module: str, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Factors that PEFT stores folded, as the matrices they stand for."""
    import torch

    if config.get("use_qalora"):
        group = int(config.get("qalora_group_size") or 16)
        # x is averaged over groups and multiplied by their number before A.
        a = a.repeat_interleave(group, dim=1) * (a.shape[1] / group)
    if blocks := config.get("use_bdlora"):
        n = int(blocks.get("nblocks") or 1)
        if any(part in module for part in blocks.get("target_modules_bd_a") or []):
            a = torch.block_diag(*a.chunk(n, dim=0))
        elif any(part in module for part in blocks.get("target_modules_bd_b") or []):
            b = torch.block_diag(*b.chunk(n, dim=0))
    if b.shape[1] < a.shape[0] and a.shape[0] % b.shape[1] == 0 and not config.get("target_parameters"):
        b = torch.block_diag(*b.chunk(a.shape[0] // b.shape[1], dim=0))  # a convolution in groups
    return a, b


def _experts(module: str, a: Tensor, b: Tensor, r: int, scale: float) -> list[Delta]:
    """One ΔW an expert: A is stacked by expert, in B the expert runs fastest (`ParamWrapper` in PEFT)."""
    n = a.shape[0] // r
    by_expert = b.reshape(b.shape[0], r, n)
    return [Delta(f"{module}[{e}]", a[e * r : (e + 1) * r], by_expert[:, :, e], scale) for e in range(n)]
