"""Graft: a fine-tuning workbench for pretrained language models."""

__version__ = "0.1.0"
