"""Estimates a step's time from the text that the TPU compiler (libtpu) prints of its scheduled program.

That text is private to libtpu and may change with any version. `estimate` is the one public function; it raises HloError if
it cannot read the text, and the planner then reports memory and fit without a step time.
"""

from curia_jax.plan.estimator.hlo import HloError
from curia_jax.plan.estimator.step import CollectiveTime, LargeTensor, PartTime, StepEstimate, estimate

TESTED_LIBTPU = ("0.0.42.1", "0.0.50.1")  # those of jax[tpu] at both ends of what is supported

__all__ = ["TESTED_LIBTPU", "CollectiveTime", "HloError", "LargeTensor", "PartTime", "StepEstimate", "estimate"]
