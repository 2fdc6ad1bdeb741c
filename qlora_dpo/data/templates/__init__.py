"""Chat templates: rendering and tokenizing chats with them, what they do to answers, and their settings."""
