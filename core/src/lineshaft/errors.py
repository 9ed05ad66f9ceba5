"""Every error that lineshaft raises on purpose, in one tree: see `lineshaft_contract.errors`.

Catch `LineshaftError` to catch them all. Owns nothing: this is where those who use the engine find them.
"""

from lineshaft_contract.errors import *  # noqa: F403
