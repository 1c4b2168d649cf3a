"""One's own people, from trackers, annotation tools and tables: a file a format, one data set."""
