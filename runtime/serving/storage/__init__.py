"""Clips and uploads where every node finds them: a folder that all have, or object storage."""
