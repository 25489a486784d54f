"""What every component stands on: settings, database, jobs, Celery, blobs, base models."""
