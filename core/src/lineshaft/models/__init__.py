"""Model families, each written once against the op contract. Knows no array library."""

from lineshaft.models.family import BuildContext, Model, ModelFamily, builtin_families, find_family

__all__ = ["BuildContext", "Model", "ModelFamily", "builtin_families", "find_family"]
