"""The contract of a metric, its inputs, and the bank that updates all metrics of a run."""
