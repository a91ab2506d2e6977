"""Functions of tensors and arrays that know nothing of runs: attention reads, distributions, intervals."""
