"""How fast pruning is beside stock LLaVA on one machine, in interleaved pairs."""
