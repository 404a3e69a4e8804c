"""Captions and references in, numbers with error bars out. No model is known here, and no torch."""

from qvision_lab.evaluation.report import Comparison, EvaluationReport, compare, evaluate

__all__ = ["Comparison", "EvaluationReport", "compare", "evaluate"]
