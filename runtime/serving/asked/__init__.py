"""What clients ask for, in the words of all of them, turned into what this server makes.

Clients of several servers speak to this one: `names` takes their fields apart, `rules` says what
each must be, and `choice` makes one job of them, with a warning for what it leaves out.
"""
