"""Merging adapters into a new version, as a job of its own."""
