"""The loop: a task file becomes a run. plan → sizes → schedule → estimate → runner."""
