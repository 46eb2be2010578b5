"""Safe Delta: the entries of a change that cost least safety, and compensation for them."""
