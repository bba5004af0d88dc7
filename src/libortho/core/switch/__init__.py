"""Who is under which alpha."""
