"""The command line: one small module a command; it parses and prints, and knows nothing of how an engine works."""
