"""Meshes, sharding rules, collectives, and the processes of a run."""
