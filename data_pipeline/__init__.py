"""Exams to slice shards. Knows DICOM, NIfTI and ArrayRecord; never imports jax."""
