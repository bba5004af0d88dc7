"""What an audit measures."""
