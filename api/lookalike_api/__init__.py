"""The doors of Lookalike: HTTP API, sampling service, command line, Python client."""
