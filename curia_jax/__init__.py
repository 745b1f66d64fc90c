"""Pretraining, conversion and evaluation of a radiology foundation model in JAX."""
