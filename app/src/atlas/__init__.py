"""Atlas: an ingestion service that never loses what it has acknowledged."""

__version__ = "0.1.0"
