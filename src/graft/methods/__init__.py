"""The methods of fine-tuning: one file each, found on disk."""
