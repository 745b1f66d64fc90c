"""Launches the project's commands on pods and restarts what the cloud takes away. Imports curia_common alone."""
