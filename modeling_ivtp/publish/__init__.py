"""Staging, checking and pushing a repository, and its card."""
