"""Plans a run on a TPU pod without the hardware: memory, step time, communication, input and cost."""
