"""Guidance: which branches the model is called for, and with what weights their outputs are combined.

G = sum_k w_k m_k over the branches k. A method is a class that names its branches and gives the weights w of every
model evaluation; a branch whose weight is exactly 0 is not run at all. Classifier guidance adds the gradient of a
classifier to the rows themselves, with or without branches.
"""

from . import scales
from .base import Guidance, Scale
from .branches import Autoguidance, Compose, EditCFG, PerturbedGuidance
from .cfg import CFG, CFGPlusPlus
from .classifier import ClassifierGuidance, GradientGuidance

__all__ = [
    "CFG",
    "Autoguidance",
    "CFGPlusPlus",
    "ClassifierGuidance",
    "Compose",
    "EditCFG",
    "GradientGuidance",
    "Guidance",
    "PerturbedGuidance",
    "Scale",
    "scales",
]
