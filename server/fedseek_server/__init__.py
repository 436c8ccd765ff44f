"""The coordinator an operator runs: it adds what it cannot read."""
