"""Answering questions, and the HTTP server."""
