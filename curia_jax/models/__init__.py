"""Models: pure functions of arrays. They know no files, meshes or clocks."""
