"""The formats of logs, by name: each is one entry, in a module of its own."""

from __future__ import annotations

from probe.tasks.imports.anthropic import ANTHROPIC
from probe.tasks.imports.bfcl import BFCL
from probe.tasks.imports.datasets import HF
from probe.tasks.imports.inspect_log import INSPECT
from probe.tasks.imports.mcp import MCP
from probe.tasks.imports.openai import OPENAI
from probe.tasks.imports.record import Format
from probe.tasks.imports.scout import SCOUT
from probe.tasks.imports.tau2 import TAU2
from probe.tasks.imports.vllm import VLLM

FORMATS: dict[str, Format] = {
    format.name: format for format in (OPENAI, ANTHROPIC, INSPECT, SCOUT, TAU2, MCP, HF, VLLM, BFCL)
}
"""Every format that can be imported."""
