"""What runs say, as data: scores, checks, evaluations, sweeps, rates and rules."""
