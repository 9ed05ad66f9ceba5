"""The conformance suite of lineshaft: checks what a backend claims, and certifies what it passes."""
