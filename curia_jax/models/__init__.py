"""Models: pure functions of arrays. No files, no meshes, no clocks."""
