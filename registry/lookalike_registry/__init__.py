"""Adapter files and their MLflow versions."""
