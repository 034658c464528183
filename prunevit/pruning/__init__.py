"""Pruning: what can go, what it is worth, how much must go, and how the rest learns to do without it."""

from .budget import Budget
from .groups import KINDS, Group, groups_of
from .method import Method, Scorer
from .plan import BlockPlan, Plan
from .prune import METHODS, prune
from .ranking import Ranking
from .surgery import compact

__all__ = [
    "KINDS",
    "METHODS",
    "BlockPlan",
    "Budget",
    "Group",
    "Method",
    "Plan",
    "Ranking",
    "Scorer",
    "compact",
    "groups_of",
    "prune",
]
