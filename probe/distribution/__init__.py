"""`probe distribution`: output distributions of runs and texts, as documents, lines and figures."""
