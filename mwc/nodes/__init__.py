"""Nodes: exact ways to differentiate a run of stages."""
