//! Metrics and access logs: reads finished records, writes the formats that Istio's tools expect
