"""What a run optimizes: one file each, found on disk."""
