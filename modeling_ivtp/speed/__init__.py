"""The speed benchmark: pruning against stock LLaVA on one machine, in interleaved pairs."""
