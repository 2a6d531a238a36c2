"""Experiment trackers: CSV files, TensorBoard, Weights & Biases, MLflow, Trackio, and others that users write."""

from stratagem.train.trackers.tracker import TrackedRecord, TrackedRun, Tracker, TrackingEnd

__all__ = ["TrackedRecord", "TrackedRun", "Tracker", "TrackingEnd"]
