"""Guidance: which branches the model is called for, and with what weights their outputs are combined.

G = sum_k w_k m_k over the branches k. A method is a class that names its branches and gives the weights w of every
model evaluation, either ahead of the run (`Guidance.table`) or by an equation of the branches' moments
(`MomentGuidance.guide`), from which the kernels compute them; a branch whose weight is exactly 0 is not run at all.
Classifier guidance adds the gradient of a classifier to the rows themselves, with or without branches.
"""

from . import scales, vectors
from .base import Guidance, Scale
from .branches import Autoguidance, Compose, EditCFG, PerturbedGuidance
from .cfg import CFG, CFGPlusPlus, CFGZeroStar
from .classifier import ClassifierGuidance, GradientGuidance
from .custom import BranchMoments, CustomGuidance
from .moments import MomentGuidance
from .norms import MagnitudeAwareCFG, NormPreservingCFG
from .projections import APG, PerpNeg, TangentialCFG
from .thresholding import DynamicThresholding

__all__ = [
    "APG",
    "CFG",
    "Autoguidance",
    "BranchMoments",
    "CFGPlusPlus",
    "CFGZeroStar",
    "ClassifierGuidance",
    "Compose",
    "CustomGuidance",
    "DynamicThresholding",
    "EditCFG",
    "GradientGuidance",
    "Guidance",
    "MagnitudeAwareCFG",
    "MomentGuidance",
    "NormPreservingCFG",
    "PerpNeg",
    "PerturbedGuidance",
    "Scale",
    "TangentialCFG",
    "scales",
    "vectors",
]
