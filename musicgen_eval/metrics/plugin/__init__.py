"""The contract between a metric and a run, the inputs of metrics, and the `MetricBank`, which updates all metrics of a run."""
