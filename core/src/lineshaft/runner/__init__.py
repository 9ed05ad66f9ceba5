"""Running steps: buckets, packed inputs, programs, and the worker that owns one session."""
