"""What memory plans the command line tells of: of this machine or a limit, and of other cards."""
