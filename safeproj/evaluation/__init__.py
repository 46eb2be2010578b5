"""What a model does on prompts, before and after: refusals, compliance and skills."""
