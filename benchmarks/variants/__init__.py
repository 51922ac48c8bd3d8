"""Other architectures, each a file of at most forty lines: examples to copy, trained and judged in the results."""
