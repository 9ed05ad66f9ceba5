"""An example of a backend plugin: see docs/writing-a-plugin.md."""
