"""Launches the project's commands on pods and restarts them after failures and preemptions. Imports curia_common alone."""
