"""How checks are run: in child processes with a time limit, so that no plugin can take the suite down.

The parent never imports a plugin; whatever one does is seen in the child that ran it.
"""
