"""Task files: strict JSON lines with line and column, the kinds of tasks, and imports from other benchmarks."""
