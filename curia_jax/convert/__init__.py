"""Checkpoints to PyTorch safetensors, and the checks that these compute what the trained model does."""
