"""Text: chats, tokens, characters and the shipped corpus."""
