"""One local page over a run, to look into its results by hand."""
