"""What can be seen of a video while it is made: its picture and sound, and how far it is.

`watching` is an answer that lasts as long as a job, `stream` and `events` are the two of them, and
`routes` says where they are.
"""
