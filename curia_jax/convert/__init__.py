"""Checkpoints to PyTorch: safetensors in the names that transformers and timm load, checked before they appear."""
