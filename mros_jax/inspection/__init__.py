"""What the report and the explorer show of a run: ranked lists, parts of pairs, pictures."""
