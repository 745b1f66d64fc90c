"""tiny.py on one device of the test's process, with the fields that decide what happens to a changed dataset."""

import runpy
from pathlib import Path

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("tiny.py")))["get_config"]()
    config.duration = "6 steps"
    config.save_every = "2 steps"
    config.keep_every = ""
    config.data.additions = None
    config.data.on_change = "refuse"
    config.mesh.data = config.mesh.fsdp = 1
    config.devices.platform = "auto"
    config.devices.cpu_count = 0
    return config
