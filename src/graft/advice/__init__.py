"""What to choose, with reasons: rules of the field, finished comparisons, and what fits."""
