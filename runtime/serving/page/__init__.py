"""The page at `/`: `routes` serves what lies in `serving/static/`, filled in for the model."""
