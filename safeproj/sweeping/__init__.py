"""What every useful intervention on an adapter does to the model, beside controls."""
