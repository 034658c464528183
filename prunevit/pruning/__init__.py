"""Pruning: what can go, what it is worth, how much must go, and how the rest learns to do without it."""

from .budget import Budget
from .groups import KINDS, Group, groups_of
from .method import Method, Scorer
from .plan import BlockPlan, Plan
from .prune import METHODS, prune
from .ranking import Ranking
from .recipe import Recipe
from .recover import History, Step, accuracy, recover
from .surgery import compact

__all__ = [
    "KINDS",
    "METHODS",
    "BlockPlan",
    "Budget",
    "Group",
    "History",
    "Method",
    "Plan",
    "Ranking",
    "Recipe",
    "Scorer",
    "Step",
    "accuracy",
    "compact",
    "groups_of",
    "prune",
    "recover",
]
