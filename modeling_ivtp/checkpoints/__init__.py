"""Reading, converting and joining checkpoints."""
