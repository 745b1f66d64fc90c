"""Models: pure functions of arrays. They do not use files, meshes or clocks."""
