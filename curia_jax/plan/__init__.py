"""Knows before a run what it will do on a pod: memory, step time, communication, input and cost, without the hardware."""
