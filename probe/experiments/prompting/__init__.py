"""Experiments on prompting tasks, into prompting.parquet."""
