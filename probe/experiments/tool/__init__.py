"""Experiments on tool tasks, into interventions.parquet."""
