"""The methods, the training loop, the launcher and the worker's train task."""
