"""Pruning: what can go, what it is worth, how much must go, and how the rest learns to do without it."""
