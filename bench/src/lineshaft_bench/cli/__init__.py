"""The commands that this distribution adds to `lineshaft`; each module parses and prints, and imports late."""
