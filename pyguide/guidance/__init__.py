"""Guidance: which branches the model is called for, and with what weights their outputs are combined.

G = sum_k w_k m_k over the branches k. A method is a class that names its branches and gives the weights w of every
model evaluation; a branch whose weight is exactly 0 is not run at all. Classifier guidance adds the gradient of a
classifier to the rows themselves, with or without branches.
"""

from .base import Guidance, Scale
from .cfg import CFG
from .classifier import ClassifierGuidance, GradientGuidance

__all__ = ["CFG", "ClassifierGuidance", "GradientGuidance", "Guidance", "Scale"]
