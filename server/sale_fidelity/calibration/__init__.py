"""Choosing what every head of a model does: the paper's thresholds, or the least cost under one error budget."""
