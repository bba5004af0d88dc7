"""``split``: divide a weight, knowing nothing but the weight."""
