"""Serving: an OpenAI-shaped server for a base and many adapters."""
