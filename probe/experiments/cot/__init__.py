"""Experiments on chains of thought, into reasoning.parquet."""
