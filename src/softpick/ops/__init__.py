"""Backends: ``reference`` (full matrix, the oracle), ``tiled`` (CPU, O(T) memory), and their operator registration."""
