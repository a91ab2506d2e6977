"""Sparse autoencoders of a residual stream, read from the files in which they are published.

A directory, or a folder of a hub repository, in one of two formats:

SAELens       cfg.json and sae_weights.safetensors: W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc, b_dec and what the
              architecture needs beside: `standard`, `jumprelu` (as which batch-top-k ones are saved too), `topk`, `gated`
Gemma Scope   params.npz (1) or params.safetensors (2): the same four under w_ or W_, and `threshold` [d_sae]; JumpReLU

Nothing of a file is run: pickled weights, also those inside of an npz, are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import BadInput, ModelUnavailable, UsageError
from probe.model.names import hub_reachable

if TYPE_CHECKING:
    from torch import Tensor

FILES = (("cfg.json", "sae_weights.safetensors"), ("params.npz",), ("params.safetensors",))
"""Files of a format, the weights last."""
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")
_ALSO = {"batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu", "jump_relu": "jumprelu"}
"""Names of architectures that act as another once they are trained."""
_NORMS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
"""What SAELens divides a state by; the second is folded into the weights when it saves, and changes nothing here."""
_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_EPSILON = 1e-5


@dataclass(frozen=True, eq=False, kw_only=True)
class Autoencoder:
    """x̂ = f(x) W_dec + b_dec with f(x) ≥ 0, mostly zeros; float32."""

    name: str
    """As the user wrote it."""
    sha256: str
    """Of the file of weights."""
    layer: int | None
    """The block behind which it was trained; None where the files do not say."""
    architecture: str
    w_enc: Tensor
    """[d_in, d_sae]"""
    b_enc: Tensor
    """[d_sae]; of a gated one the bias of the gate."""
    w_dec: Tensor
    """[d_sae, d_in]"""
    b_dec: Tensor
    """[d_in]"""
    threshold: Tensor | None = None
    """[d_sae], of `jumprelu`."""
    k: int = 0
    """Features that are active at most, of `topk`."""
    gate: tuple[Tensor, Tensor] | None = None
    """r_mag and b_mag, [d_sae] each, of `gated`."""
    centred: bool = True
    """Whether b_dec is subtracted before the encoder."""
    norm: str = "none"

    @property
    def d_in(self) -> int:
        return self.w_enc.shape[0]

    @property
    def width(self) -> int:
        """Number of features, d_sae."""
        return self.w_enc.shape[1]

    def encode(self, states: Tensor) -> Tensor:
        """Activations [row, d_sae] of states [row, d_in]."""
        mean, into, _ = self._scales(states)
        x = (states - mean) / into
        x = x - self.b_dec if self.centred else x
        before = x @ self.w_enc + self.b_enc
        if self.gate is not None:
            r_mag, b_mag = self.gate
            return (before > 0) * (x @ (self.w_enc * r_mag.exp()) + b_mag).relu()
        if self.threshold is not None:
            return before.relu() * (before > self.threshold)
        if self.k:
            best = before.topk(min(self.k, self.width), dim=-1)
            return before.new_zeros(before.shape).scatter_(-1, best.indices, best.values.relu())
        return before.relu()

    def decode(self, activations: Tensor, states: Tensor) -> Tensor:
        """Reconstructions [row, d_in] of activations; `states` are those that were encoded, whose scale they take."""
        mean, _, back = self._scales(states)
        return (activations @ self.w_dec + self.b_dec) * back + mean

    def _scales(self, states: Tensor) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """What is subtracted and divided by before the encoder, and multiplied by behind the decoder, [row, 1] each."""
        if self.norm == "constant_norm_rescale":
            length = states.norm(dim=-1, keepdim=True) / math.sqrt(self.d_in)
            return 0.0, length, length
        if self.norm == "layer_norm":
            mean, spread = states.mean(-1, keepdim=True), states.std(-1, keepdim=True)
            return mean, spread + _EPSILON, spread
        return 0.0, 1.0, 1.0

    def refuse_other_width(self, d_model: int) -> None:
        """Raise UsageError for a model of another width."""
        if self.d_in != d_model:
            raise UsageError(
                f"{self.name}: reads states of {self.d_in} numbers, the run's have {d_model}: it is of another model, "
                "or of another site; give one that was trained on this model's residual stream"
            )


def read_autoencoder(name: str, *, offline: bool = False) -> Autoencoder:
    """The autoencoder of a directory, or of OWNER/REPOSITORY/FOLDER on the hub.

    Raises BadInput for files that are none, or of an architecture or a site that is not known here; ModelUnavailable where
    the hub does not have it or cannot be reached.
    """
    config, weights = _located(name, offline)
    tensors = _arrays(weights)
    facts = _facts(config) if config is not None else {}
    return _built(name, weights, facts, tensors)


# -- files ---------------------------------------------------------------------------------------------------------


def _located(name: str, offline: bool) -> tuple[Path | None, Path]:
    """The configuration, where the format has one, and the weights."""
    path = Path(name).expanduser()
    if path.is_dir():
        for names in FILES:
            if (path / names[-1]).is_file():
                config = path / names[0]
                if len(names) > 1 and not config.is_file():
                    raise _wrong(
                        config, "file", "is missing", "it says which architecture the weights are of"
                    )
                return (config if len(names) > 1 else None), path / names[-1]
        pickled = [file.name for file in path.iterdir() if file.suffix in _PICKLED]
        folders = sorted(str(file.parent) for names in FILES for file in path.rglob(names[-1]))
        what = (
            f"{pickled[0]} is pickled, and loading it could run code: save it with SAELens' `sae.save_model`"
            if pickled
            else f"give one of its folders: {', '.join(folders[:4])}"
            if folders
            else f"needs {' or '.join(' and '.join(names) for names in FILES)}"
        )
        raise _wrong(path, "file", "no sparse autoencoder", what)
    repository, folder = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if path.exists() or name.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise _wrong(
            path, "file", "is no directory", "give a directory, or OWNER/REPOSITORY/FOLDER of the hub"
        )
    return _downloaded(
        name, repository, folder, offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    )


def _downloaded(name: str, repository: str, folder: str, offline: bool) -> tuple[Path | None, Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    offline = offline or not hub_reachable()
    why = "offline, or the hub cannot be reached" if offline else ""
    for names in FILES:
        try:
            paths = [
                Path(hf_hub_download(repository, f"{folder}/{file}".lstrip("/"), local_files_only=offline))
                for file in names
            ]
        except LocalEntryNotFoundError:
            continue
        except EntryNotFoundError as error:
            why = f"no such file ({error.__class__.__name__})"
            continue
        except (HfHubHTTPError, OSError, ValueError) as error:
            why = str(error).splitlines()[0] if str(error) else error.__class__.__name__
            break
        return (paths[0] if len(names) > 1 else None), paths[-1]
    raise ModelUnavailable(
        f"{name}: no sparse autoencoder there in the local cache, {why or 'nor on the hub'}.\nGet it with `hf download "
        f'{repository} --include "{folder or "*"}/*"` where there is a network, or give a local directory that has '
        f"{' or '.join(' and '.join(names) for names in FILES)}."
    )


def _arrays(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, float32, SAELens' names. Raises BadInput."""
    import torch

    if path.suffix == ".npz":
        import numpy as np

        if not zipfile.is_zipfile(path):
            raise _wrong(path, "file", "is no npz", "download it again")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: torch.from_numpy(np.asarray(file[key], np.float32)) for key in file.files}
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            why = (
                "has pickled objects, which could run code"
                if "pickle" in str(error)
                else f"is no npz ({error})"
            )
            raise _wrong(
                path, "file", why, "write plain arrays with numpy.savez, or give safetensors"
            ) from None
    else:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            arrays = {key: tensor.float() for key, tensor in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise _wrong(path, "file", f"is no safetensors file ({error})", "download it again") from None
    return {f"W_{key[2:]}" if key.startswith("w_") else key: tensor for key, tensor in arrays.items()}


def _wrong(path: Path | str, field: str, what: str, advice: str) -> BadInput:
    return BadInput([f"{path}:1:1: {field}: {what}: {advice}"])


# -- what they say -------------------------------------------------------------------------------------------------


def _facts(path: Path) -> dict[str, Any]:
    """SAELens' configuration as its versions 3 to 6 write it, with the keys of version 6 and its defaults."""
    try:
        config: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _wrong(path, "file", f"is not readable as JSON ({error})", "download it again") from None
    if not isinstance(config, dict):
        raise _wrong(path, "file", "is no JSON object", "download it again")
    facts: dict[str, Any] = {**config, **(config.get("metadata") or {})}
    facts.setdefault("hook_name", facts.get("hook_point"))
    activation = facts.get("activation_fn") or facts.get("activation_fn_str") or "relu"
    if activation == "topk":
        facts |= {"architecture": "topk", "k": (facts.get("activation_fn_kwargs") or {}).get("k")}
    elif activation != "relu":
        raise _wrong(path, "activation_fn", f"{activation} is not known here", "relu and topk are")
    norm = facts.get("normalize_activations") or "none"
    norm = "expected_average_only_in" if norm is True else norm
    if norm not in _NORMS:
        raise _wrong(
            path, "normalize_activations", f"{norm} is not known here", f"known are {', '.join(_NORMS)}"
        )
    return facts | {"normalize_activations": norm}


def _built(name: str, path: Path, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> Autoencoder:
    """Raises BadInput where tensors are missing or do not fit."""
    lacks = [key for key in ("W_enc", "W_dec", "b_dec") if key not in tensors]
    if lacks:
        has = ", ".join(sorted(tensors)) or "nothing"
        raise _wrong(
            path,
            lacks[0],
            "is missing",
            f"an autoencoder has W_enc, W_dec, b_enc and b_dec; the file has {has}",
        )
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors["log_threshold"].exp()
    if "topk_threshold" in tensors:
        tensors["threshold"] = tensors["topk_threshold"].reshape(()).expand(tensors["W_enc"].shape[1])
    scope = path.name.startswith("params.")
    written = facts.get("architecture") or ("jumprelu" if scope or "threshold" in tensors else "standard")
    architecture = _ALSO.get(written, written)
    if architecture not in ARCHITECTURES:
        raise _wrong(
            path, "architecture", f"{written} is not known here", f"known are {', '.join(ARCHITECTURES)}"
        )
    needed = {
        "standard": ("b_enc",),
        "jumprelu": ("b_enc", "threshold"),
        "topk": ("b_enc",),
        "gated": ("b_gate", "r_mag", "b_mag"),
    }[architecture]
    for key in needed:
        if key not in tensors:
            raise _wrong(path, key, "is missing", f"an autoencoder of the architecture {written} has it")
    k = facts.get("k")
    if architecture == "topk" and not (isinstance(k, int) and k > 0):
        raise _wrong(path, "k", f"{k!r} is no number of features", "cfg.json says how many are active")
    d_in, width = tensors["W_enc"].shape
    shapes = {"W_dec": (width, d_in), "b_dec": (d_in,)} | dict.fromkeys(needed, (width,))
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape:
            raise _wrong(path, key, f"has shape {tuple(tensors[key].shape)}", f"W_enc asks for {shape}")
    w_enc, w_dec, b_enc = tensors["W_enc"], tensors["W_dec"], tensors[needed[0]]
    scale = tensors.get("finetuning_scaling_factor", tensors.get("scaling_factor"))
    if scale is not None:
        w_dec = w_dec * scale[:, None]
    if architecture == "topk" and facts.get("rescale_acts_by_decoder_norm"):
        lengths = w_dec.norm(dim=-1)
        w_enc, b_enc, w_dec = w_enc * lengths, b_enc * lengths, w_dec / lengths[:, None]
    return Autoencoder(
        name=name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        layer=_layer(name, path, facts),
        architecture=architecture,
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=tensors["b_dec"],
        threshold=tensors["threshold"] if architecture == "jumprelu" else None,
        k=k or 0 if architecture == "topk" else 0,
        gate=(tensors["r_mag"], tensors["b_mag"]) if architecture == "gated" else None,
        centred=not scope and bool(facts.get("apply_b_dec_to_input", True)),
        norm=facts.get("normalize_activations", "none"),
    )


def _layer(name: str, path: Path, facts: Mapping[str, Any]) -> int | None:
    """The block behind which the states are that it reads. Raises BadInput for those of another site."""
    hook = facts.get("hook_name")
    if hook:
        matched = re.search(r"(?:blocks|layers|h)\.(\d+)(?:\.(\w+))?$", hook)
        site = matched and (matched[2] or "output")
        if matched and site in ("hook_resid_post", "output"):
            return int(matched[1])
        if matched and site == "hook_resid_pre" and int(matched[1]):
            return int(matched[1]) - 1
        raise _wrong(
            path,
            "hook_name",
            f"{hook} is no state behind a block",
            "give an autoencoder of blocks.N.hook_resid_post",
        )
    if other := re.search(
        r"gemma-scope\S*-(?:mlp|att|transcoders)|/(?:attn_out|mlp_out|transcoder|clt)", f"{name} {path}"
    ):
        raise _wrong(path, "site", f"{other[0]} is no residual stream", "give an autoencoder of resid_post")
    inside = re.findall(r"layer_(\d+)", f"{name} {path}")
    return int(inside[-1]) if inside else None
