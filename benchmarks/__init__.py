"""Paired measurements of probe against what people use instead; `python -m benchmarks`, see README.md.

Rooms: `ours` is the only one that calls probe; `others` the only one that calls transformers, transformer-lens and,
in a process of its own, nnsight. `inputs` makes what all of them run. One section of the table is one room:
`generation` (with `agreement` and `roofline`), `candidates`, `prefix`, `memory`, `nnsight_pair`. `timing` and `machine`
measure, `table` holds the figures and shows them.
"""
