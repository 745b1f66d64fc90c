"""Scores of frozen features: kNN, ridge and logistic probes, with intervals from a bootstrap over patients."""
