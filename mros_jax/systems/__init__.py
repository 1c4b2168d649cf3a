"""One file for each paper's network."""
