"""What every command needs: errors and exit codes, command-line scaffolding, progress, logging, reading windows.

Imports neither jax nor anything that reads DICOM, and takes milliseconds to import.
"""

__version__ = "0.3.0"
