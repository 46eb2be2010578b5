"""The repairs: a folder each, and what they share."""
