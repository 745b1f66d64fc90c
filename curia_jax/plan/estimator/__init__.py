"""Step time from the TPU compiler's own text. Tested with libtpu 0.0.52."""
