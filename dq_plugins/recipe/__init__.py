"""Recipes: named, ordered lists of passes; the pass protocol; and the runner that makes a plan."""

from dq_plugins.progress import Progress
from dq_plugins.recipe.definition import Recipe, Step
from dq_plugins.recipe.pass_context import PassContext
from dq_plugins.recipe.pass_protocol import Pass, PassOptions
from dq_plugins.recipe.runner import make_plan

__all__ = ["Pass", "PassContext", "PassOptions", "Progress", "Recipe", "Step", "make_plan"]
