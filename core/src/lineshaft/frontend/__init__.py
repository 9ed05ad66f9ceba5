"""Between a user's prompts and an engine's tokens: what the blocking and the asynchronous API have in common."""
