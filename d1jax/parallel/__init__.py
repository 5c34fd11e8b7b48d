"""Meshes, placements and processes: the only room that knows devices."""
