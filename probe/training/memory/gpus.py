"""GPUs and their memory.

`nominal` is what is sold, GiB. `seen` is what torch can use, GiB: the total capacity in torch's own messages where
one of that card was read (public bug reports), absent elsewhere.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from probe.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    name: str
    nominal: float
    seen: float | None = None

    @property
    def usable_bytes(self) -> int:
        """What torch can allocate: `seen`, else `nominal`."""
        return int((self.seen or self.nominal) * 2**30)


_NOMINAL = {
    "rtx-3060": 12,
    "rtx-3070": 8,
    "rtx-3080": 10,
    "rtx-3090": 24,
    "rtx-4060": 8,
    "rtx-4060-ti-16gb": 16,
    "rtx-4070": 12,
    "rtx-4070-ti-super": 16,
    "rtx-4080": 16,
    "rtx-4090": 24,
    "rtx-5060-ti-16gb": 16,
    "rtx-5070": 12,
    "rtx-5070-ti": 16,
    "rtx-5080": 16,
    "rtx-5090": 32,
    "rtx-a4000": 16,
    "rtx-a5000": 24,
    "rtx-a6000": 48,
    "rtx-6000-ada": 48,
    "rtx-pro-6000": 96,
    "t4": 16,
    "v100-16gb": 16,
    "v100-32gb": 32,
    "a10": 24,
    "a10g": 24,
    "l4": 24,
    "l40s": 48,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "h100-80gb": 80,
    "h100-nvl": 94,
    "h200": 141,
    "b200": 180,
    "mi210": 64,
    "mi250x": 128,
    "mi300x": 192,
    "mi325x": 256,
}
# H200 and B200 are sold in units of 10⁹ bytes.
_SEEN = {"rtx-4090": 23.64, "rtx-3080": 9.78, "rtx-5090": 31.51}
GPUS = {
    name: Gpu(name, size if name not in ("h200", "b200") else round(size * 1e9 / 2**30, 1), _SEEN.get(name))
    for name, size in _NOMINAL.items()
}


def gpu(name: str) -> Gpu:
    """The GPU of a name, or of a size such as `24GiB` or `24GB`. Raises UsageError."""
    key = name.lower().replace(" ", "-").replace("_", "-").removeprefix("nvidia-")
    if key in GPUS:
        return GPUS[key]
    for unit, size in (("gib", 2**30), ("gb", 10**9)):
        number = key.removesuffix(unit)
        if key.endswith(unit) and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return Gpu(name, float(number) * size / 2**30)
    near = difflib.get_close_matches(key, GPUS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"--gpu {name}: not known{hint}; give a size such as 24GiB, or one of {', '.join(GPUS)}")
