"""Named runs, installed as curia_jax.configs: one file each, all made from base.py."""
