"""Tools: their definitions, calls read from text and judged, and tools that are really executed."""
