"""Readers of exams: one file per kind of input. Each keeps the contract in base.py."""
