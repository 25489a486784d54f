"""Caches of what a frozen base makes of photos, words and class prompts. Imports torch."""
