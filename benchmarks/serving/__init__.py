"""Serving on vLLM: the engines that are compared, the list of checks, and speed."""
