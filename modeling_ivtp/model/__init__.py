"""Everything that travels to the Hub with a checkpoint, and nothing else: flat files with single-dot imports."""
