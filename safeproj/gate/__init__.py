"""The gate: whether an adapter passes a policy, by what is in it and not by what it claims."""
