"""Chat knows meaning: messages to prompt text by the provider's template, reasoning apart from content."""
