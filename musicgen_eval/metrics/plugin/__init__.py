"""Defines the contract between a metric and a run, the inputs of metrics, and `MetricBank`, which updates all metrics of a run."""
