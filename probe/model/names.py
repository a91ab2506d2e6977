"""What `--model NAME` means, decided without importing torch or transformers.

`resolve` turns a name into a `Source`; nothing is downloaded here. Whether the source can be had is checked
by `ensure_available`, which answers in under two seconds.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from probe.errors import ModelUnavailable
from probe.model.shapes import SHAPES

DEFAULT = "smollm2-135m"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    name: str
    """Name as the user wrote it."""
    kind: str
    """`wheel` (the default model), `hub`, `directory`, `gguf`, `random` or `adapter`."""
    location: str
    """Hub id, path, or the name of the random shape."""
    revision: str | None = None
    base: Source | None = None
    """The model that an adapter was trained on."""


def resolve(name: str, revision: str | None = None, adapters: tuple[Path, ...] = ()) -> Source:
    """The source NAME stands for: default, random shape, local path, TransformerLens alias or hub id.

    `adapters` are those for which it is the base, so that none is its own.
    """
    if name == DEFAULT:
        return Source(name, "wheel", DEFAULT)
    base, plus, adapter = name.partition("+")
    if plus and _is_adapter(Path(adapter).expanduser()):
        return _adapter(name, Path(adapter).expanduser(), base, revision, adapters)
    if name.startswith("random:"):
        shape = name.removeprefix("random:")
        if shape not in SHAPES:
            raise ModelUnavailable(
                f"{name}: unknown shape{_nearest(shape, SHAPES)}; `probe models` lists them"
            )
        return Source(name, "random", shape)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            if _is_adapter(path):
                return _adapter(name, path, None, revision, adapters)
            raise ModelUnavailable(
                f"{name}: the directory has neither config.json nor adapter_config.json; give a saved "
                "transformers model or a PEFT adapter"
            )
        model = Source(name, "directory", str(path))
        if _is_adapter(path):  # a model and an adapter on it, as transformers reads such a directory
            return Source(name, "adapter", str(path), None, model)
        return model
    if path.suffix == ".gguf" or path.is_file():
        if path.suffix != ".gguf" or not path.is_file():
            raise ModelUnavailable(f"{name}: not a .gguf file that exists; give a directory or a .gguf file")
        return Source(name, "gguf", str(path))
    if name.startswith((".", "/", "~")):
        raise ModelUnavailable(f"{name}: no such directory or file; give local weights or a model name")
    if not _HUB_ID.fullmatch(name):
        raise ModelUnavailable(f"{name}: not a model name; `probe models` lists what is known")
    location, _, at = name.partition("@")
    return Source(name, "hub", aliases().get(location, location), revision or at or None)


def anchored(name: str) -> str:
    """A model name that means the same in every folder: local paths of it from the root."""
    if name == DEFAULT or name.startswith("random:"):
        return name
    base, plus, adapter = name.partition("+")
    if plus and _is_adapter(Path(adapter).expanduser()):
        return f"{anchored(base)}+{Path(adapter).expanduser().absolute()}"
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def _adapter(
    name: str, path: Path, base: str | None, revision: str | None, adapters: tuple[Path, ...]
) -> Source:
    """An adapter on the base it names, or on the one written before it (`BASE+DIRECTORY`)."""
    if path.resolve() in adapters:
        raise ModelUnavailable(f"{name} is an adapter whose base is itself")
    try:
        config = json.loads((path / "adapter_config.json").read_bytes())
        named = base or config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelUnavailable(f"{path}/adapter_config.json: not readable as JSON: {error}") from error
    if not named:
        raise ModelUnavailable(f"{name}: its configuration names no base model; write --model BASE+{path}")
    try:
        under = resolve(str(named), revision or config.get("revision"), (*adapters, path.resolve()))
    except ModelUnavailable as error:
        if adapters:
            raise
        raise ModelUnavailable(f"{name}: its base: {error}; another: --model BASE+{path}") from error
    if under.kind == "adapter":
        raise ModelUnavailable(f"{name}: its base {named} is an adapter itself; merge that one first")
    return Source(name, "adapter", str(path), None, under)


def ensure_available(source: Source, offline: bool) -> None:
    """Raise ModelUnavailable in under two seconds if a hub model is neither cached nor reachable."""
    if source.base is not None:
        try:
            return ensure_available(source.base, offline)
        except ModelUnavailable as error:
            raise ModelUnavailable(f"{error}\nAnother base: --model BASE+{source.location}") from error
    if source.kind != "hub" or is_cached(source):
        return
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    if offline or not hub_reachable():
        why = "offline" if offline else "the hub cannot be reached"
        raise ModelUnavailable(f"{source.name}: not in the local cache and {why}.\n{_advice(source)}")


def is_cached(source: Source) -> bool:
    """Whether the hub's local cache holds this model's configuration and some weights."""
    from huggingface_hub import try_to_load_from_cache

    def have(file: str) -> bool:
        return isinstance(try_to_load_from_cache(source.location, file, revision=source.revision), str)

    weights = ("model.safetensors", "model.safetensors.index.json")
    return have("config.json") and any(have(file) for file in weights)


def hub_reachable(timeout: float = 1.0) -> bool:
    from huggingface_hub import constants

    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    address = urlsplit(proxy or constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=timeout):
            return True
    except OSError:
        return False


def _advice(source: Source) -> str:
    page = "gated models (Gemma, Llama) also need their licence accepted on the model's hub page"
    return (
        f"Get it with `hf download {source.location}` where there is a network ({page}, then `hf auth login`), "
        f"give a local directory with `--model PATH`, use the default `--model {DEFAULT}`, or see the same "
        f"shape with random weights: {_random_hint(source)}."
    )


def _random_hint(source: Source) -> str:
    near = difflib.get_close_matches(source.location.rsplit("/")[-1], SHAPES, n=1, cutoff=0.4)
    return f"`--model random:{near[0] if near else 'tiny-llama'}`"


@cache
def aliases() -> dict[str, str]:
    """TransformerLens's short names → hub ids, read from its data file (importing it takes seconds)."""
    spec = importlib.util.find_spec("transformer_lens")
    if spec is None or spec.origin is None:
        return {}
    table = Path(spec.origin).parent / "tools" / "model_registry" / "data" / "model_aliases.json"
    try:
        official = json.loads(table.read_text())["aliases"]
    except (OSError, KeyError, ValueError):
        return {}
    return {alias: hub_id for hub_id, names in official.items() for alias in names}


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
