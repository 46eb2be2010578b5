"""A full fine-tune as an adapter: the best approximation of what it changed."""
