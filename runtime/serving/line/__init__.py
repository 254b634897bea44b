"""What the line in front of the engines knows of an attempt, and tells to those who wait."""
