"""Plans: the memory of a fine-tune on every rank, predicted from shapes."""

from feinwerk.plan.fit import Fit, Option
from feinwerk.plan.predict import Part, Plan, plan
from feinwerk.plan.settings import Settings

__all__ = ["Fit", "Option", "Part", "Plan", "Settings", "plan"]
