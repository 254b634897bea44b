"""What commands share of the terminal: printing, ending in order, and completion by shells."""
