"""Metrics, their intervals, and differences between models."""
