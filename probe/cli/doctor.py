"""`probe doctor`: what there is here, in one look."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path


def examine() -> dict[str, str]:
    """Versions, device, memory, disk, and whether the default model is cached."""
    import importlib.metadata

    facts = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "transformers", "transformer-lens", "tokenizers", "safetensors", "pyarrow"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "missing: `make run` installs it"
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["cuda"] = ", ".join(gpus) or "none (probe runs on the CPU)"
    facts["cpu threads"] = str(torch.get_num_threads())
    facts["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    facts["free disk here"] = f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB"
    from probe.model.weights import default_model_path

    cached = (default_model_path() / "config.json").is_file()
    facts["default model"] = "ready" if cached else "not fetched yet (93 MB on the first run)"
    return facts
