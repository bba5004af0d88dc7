"""``audit``: is it really gone, and is the rest unharmed."""
