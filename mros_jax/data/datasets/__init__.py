"""One record a data set: how it is read, where it comes from, and what is known of it."""
