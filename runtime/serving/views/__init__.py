"""Routes beside those of one video, which clients of other video servers know: pages of videos,
the model's names, and a video made while its client waits.
"""
