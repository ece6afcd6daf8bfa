"""What is wrong with data, and what to do about it: check, clean, split, convert, preview."""
