"""Metrics and evaluators."""

from stratagem.compat.mmengine.evaluator.evaluator import Evaluator
from stratagem.compat.mmengine.evaluator.metric import BaseMetric, DumpResults
from stratagem.compat.mmengine.evaluator.utils import get_metric_value

__all__ = ["BaseMetric", "DumpResults", "Evaluator", "get_metric_value"]
