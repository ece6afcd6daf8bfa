"""Dialogues as token ids and a loss mask, through a chat template."""
