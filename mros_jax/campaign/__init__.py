"""Many systems over many seeds: trained one after another, measured, and put side by side."""
