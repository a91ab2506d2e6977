"""Views of tasks that analyzers and experiments share: what was chosen, a chain of thought, a task under variants."""
