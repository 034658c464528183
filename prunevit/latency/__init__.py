"""Latency budgets: what a spec takes on a device, from a table of step times checked against whole models.

A table of step times over a grid of widths is measured on the kernels (``table.py``); a spec's latency is the sum over
its plan's steps. Steps in a row run a little differently from one step again and again, so that two whole models are
timed too, the given one and one pruned evenly to about the budget, and the table is corrected by what they take. What
pruning comes to is timed again, beside the given model, and the two figures must agree.
"""

from .deployment import Deployment
from .measured import Check, LatencyMiss, Measured

__all__ = ["Check", "Deployment", "LatencyMiss", "Measured"]
