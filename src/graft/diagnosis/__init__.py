"""What a run's own figures say of it: curves, findings, and the guard that watches a run while it trains."""
