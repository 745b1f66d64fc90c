"""The HTML report of a run, and the pictures that evaluation shares."""
