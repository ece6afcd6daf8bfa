"""The engine: pieces that make the same training faster or smaller. Each is a file of its own."""
