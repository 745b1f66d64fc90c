"""Phantom of the CuriaBench tasks: labelled images of synthetic patients, in the benchmark's published schema."""
