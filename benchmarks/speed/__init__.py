"""Graft's speed and memory beside peft with transformers' Trainer and beside trl: `python -m benchmarks.speed`."""
