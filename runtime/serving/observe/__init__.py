"""What whoever runs the server sees of it: a line for each video, and spans for OpenTelemetry.

`lines` forms them, `relay` brings them from all processes to the command's standard error.
"""
