"""Evaluate a model: metrics of benchmarks."""

from .metrics import METRICS, load_metric, metric_path

__all__ = ["METRICS", "load_metric", "metric_path"]
