"""Model families, each written once against the op contract. Knows no array library."""

from lineshaft.models.builtin import builtin_families
from lineshaft.models.family import BuildContext, Model, ModelFamily, checked_family, find_family

__all__ = ["BuildContext", "Model", "ModelFamily", "builtin_families", "checked_family", "find_family"]
