"""One file per personalization method, each reading like its paper."""
