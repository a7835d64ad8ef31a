"""Meshes, sharding rules and collectives."""
