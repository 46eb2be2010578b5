"""What `make` and CI run: the demonstration, the pages' examples made again, a browser."""
