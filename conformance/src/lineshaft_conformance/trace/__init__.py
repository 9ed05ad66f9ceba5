"""Differential replay: a real generation is recorded op by op, and the same steps are run on another backend.

`store` keeps a trace, `digests` describes an array in a few numbers, `watch` runs steps and hands out what every op
returned, `record` makes a trace, `replay` finds the first op, layer and step that differ.
"""
