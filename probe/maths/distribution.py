"""The output distribution: temperature, truncation, its Boltzmann form, distillation; pure functions of logits."""

from probe.maths.distillation import Distillation, distill
from probe.maths.energy import (
    GAUGES,
    Boltzmann,
    Gauge,
    boltzmann,
    cross_entropy,
    gauge_shift,
    heat_capacity_peak,
    temperature_for_entropy,
)
from probe.maths.ranking import TokenRanking, Truncation
from probe.maths.truncation import (
    TRUNCATIONS,
    draw,
    epsilon,
    eta,
    min_p,
    sampled,
    temper,
    top_k,
    top_p,
    typical,
)

__all__ = [
    "GAUGES",
    "TRUNCATIONS",
    "Boltzmann",
    "Distillation",
    "Gauge",
    "TokenRanking",
    "Truncation",
    "boltzmann",
    "cross_entropy",
    "distill",
    "draw",
    "epsilon",
    "eta",
    "gauge_shift",
    "heat_capacity_peak",
    "min_p",
    "sampled",
    "temper",
    "temperature_for_entropy",
    "top_k",
    "top_p",
    "typical",
]
