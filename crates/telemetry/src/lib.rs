//! Logs, the Prometheus registry and the metric names.
