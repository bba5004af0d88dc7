"""Scripts that measure, and what they share."""
