"""Reading data files and making batches of them."""
