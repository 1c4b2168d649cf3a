"""The embedded data set: pedestrians drawn by this project."""
