"""An example of a backend from scratch on plain NumPy: see docs/writing-a-plugin.md."""
