"""Trackers: the record of a run, replayed to TensorBoard, Trackio, MLflow or Weights & Biases."""
