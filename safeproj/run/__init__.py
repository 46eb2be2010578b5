"""One run over one adapter or many."""
