"""Merging with a safe adapter (SafeMERGE): the updates that Safe LoRA would project."""
