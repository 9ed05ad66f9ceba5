"""Mutants over quantized caches: kernels of every `kv_scheme`, which the CPU backend has none of, broken one by one.

Unbroken they are right, so that what a check says of a mutant is the mutant's fault.
"""

from __future__ import annotations

from typing import Any

import torch

from lineshaft_conformance.mutants.mutant import Make, Mutant, all_of, with_added
from lineshaft_conformance.mutants.plain import PlainAttend, Row
from lineshaft_torch.bound import recipe
from lineshaft_torch.kernels.attend import FEATURES
from lineshaft_torch.pages import SLOTS_LAYOUT, movable

Tensor = torch.Tensor
OF_TOKENS = ("token_head", "block")
"""Schemes whose cache holds scales."""


class SchemeAttend(PlainAttend):
    """Attention over codes and their scales."""

    def __call__(self, q: Tensor, cache: Any, step: Any, **given: Tensor) -> Any:
        self.scales = given["kv_scales"].to(self.wide)
        return super().__call__(q, cache, step, **given)

    def keys(self, cache: Any, row: Row) -> Tensor:
        return self.spread(self.decoded(cache, self.slots(row), "k", self.scales[0]))

    def values(self, cache: Any, row: Row) -> Tensor:
        return self.spread(self.decoded(cache, self.slots(row), "v", self.scales[1]))

    def decoded(self, cache: Any, slots: Tensor, name: str, scale: Tensor) -> Tensor:
        """[n, Hkv, D]: codes times the scheme's scale of the whole, and times those that the cache holds."""
        codes: Tensor = cache.arrays[name][slots].to(self.wide)
        if self.problem.kv_scheme not in OF_TOKENS:
            return codes * scale.reshape(-1, 1)
        stored = self.stored(cache.arrays[f"{name}_scale"][slots].to(self.wide))
        factors = stored.reshape(*codes.shape[:2], -1, 1) * scale
        return (codes.view(*factors.shape[:3], -1) * factors).flatten(2)

    def stored(self, scales: Tensor) -> Tensor:
        return scales


class SchemeWrite:
    """`write_kv` of codes and, where the scheme says so, of their scales."""

    def __init__(self, problem: Any) -> None:
        self.problem = problem

    def __call__(self, cache: Any, k: Tensor, v: Tensor, step: Any, *, kv_scales: Tensor) -> Any:
        slots = step.groups[self.problem.group].slots.long()
        for name, new, scale in (("k", k, kv_scales[0]), ("v", v, kv_scales[1])):
            codes, scales = self.encoded(new.float() / scale.reshape(-1, 1))
            movable(cache.arrays[name]).index_copy_(0, slots, movable(codes))
            if scales is not None:
                self.keep(cache.arrays[f"{name}_scale"], slots, scales)
        return cache

    def keep(self, held: Tensor, slots: Tensor, scales: Tensor) -> None:
        held.index_copy_(0, slots, scales.reshape(-1, *held.shape[1:]))

    def encoded(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(codes [T, Hkv, D], scales of tokens [T, Hkv, groups] or None)."""
        if self.problem.kv_scheme not in OF_TOKENS:
            return self.codes(x), None
        parts = x.reshape(*x.shape[:2], -1, x.shape[2] if self.problem.kv_scheme == "token_head" else 32)
        scales = self.scales(parts.abs().amax(-1) / self.top)
        return self.codes(parts / torch.where(scales > 0, scales, 1.0)[..., None]).flatten(2), scales

    def scales(self, scales: Tensor) -> Tensor:
        return scales

    @property
    def dtype(self) -> torch.dtype:
        found = getattr(torch, self.problem.kv_dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def top(self) -> float:
        return 127.0 if self.dtype == torch.int8 else torch.finfo(self.dtype).max

    def codes(self, x: Tensor) -> Tensor:
        clamped = x.clamp(-self.top, self.top)
        return (clamped.round() if self.dtype == torch.int8 else clamped).to(self.dtype)


def only_schemes(problem: Any) -> str | None:
    return None if problem.kv_scheme != "none" else "is for quantized caches"


def kernels(attend: type[SchemeAttend] = SchemeAttend, write: type[SchemeWrite] = SchemeWrite) -> Make:
    """Makes a backend that also has these kernels for quantized caches."""
    fields: dict[str, Any] = {"layout": SLOTS_LAYOUT, "supports": only_schemes}
    return all_of(
        with_added(
            recipe("scheme_attend", "attend", lambda p, s: attend(p), handles=FEATURES | {"kv_scheme"}, **fields)
        ),
        with_added(
            recipe("scheme_write_kv", "write_kv", lambda p, s: write(p), handles=frozenset({"kv_scheme"}), **fields)
        ),
    )


def read(name: str, rule: str, case: str, **stages: Any) -> Mutant:
    broken = type("BrokenAttend", (SchemeAttend,), stages)
    return Mutant(f"attend-{name}", rule, 2, f"L2/attend/mixed/{case}", kernels(attend=broken))


def written(name: str, rule: str, case: str, **stages: Any) -> Mutant:
    broken = type("BrokenWrite", (SchemeWrite,), stages)
    return Mutant(f"write-kv-{name}", rule, 2, f"L2/write_kv/{case}", kernels(write=broken))


def with_scale(change: Any) -> Any:
    """A `decoded` that takes `change(scale)` for the scheme's scale of the whole."""
    return lambda self, cache, slots, name, scale: SchemeAttend.decoded(self, cache, slots, name, change(scale))


def scales_of_keys(self: SchemeAttend, cache: Any, row: Row) -> Tensor:
    return self.spread(self.decoded(cache, self.slots(row), "v", self.scales[0]))


def fnuz_as_ocp(self: SchemeAttend, cache: Any, slots: Tensor, name: str, scale: Tensor) -> Tensor:
    right = SchemeAttend.decoded(self, cache, slots, name, scale)
    return right * 2 if "fnuz" in self.problem.kv_dtype else right


def unmasked_values(self: SchemeAttend, weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return torch.einsum("hqn,nhd->qhd", weights, v)


MUTANTS: tuple[Mutant, ...] = (
    read("scales-of-keys", "keys and values have scales of their own (§5)", "kv_tensor-*", values=scales_of_keys),
    read("scale-ignored", "kv_scheme tensor multiplies by kv_scales (§5)", "kv_tensor-*",
         decoded=with_scale(lambda scale: scale * 0 + 1)),
    read("first-heads-scale", "kv_scheme head has a scale per head (§5)", "kv_head-*",
         decoded=with_scale(lambda scale: scale[:1])),
    read("tokens-scale-ignored", "kv_scheme token_head has a scale per token and head (§5)", "kv_token_head-*",
         stored=lambda self, scales: scales * 0 + 1),
    read("whole-scale-ignored", "stored scales are multiplied by kv_scales (§5)", "kv_token_head-*",
         decoded=with_scale(lambda scale: scale * 0 + 1)),
    read("first-blocks-scale", "kv_scheme block has a scale per 32 values (§5)", "kv_block-*",
         stored=lambda self, scales: scales[..., :1].expand_as(scales)),
    read("scheme-fnuz-as-ocp", "fp8 pages hold the flavour that kv_dtype names", "kv_tensor-e4m3fnuz*",
         decoded=fnuz_as_ocp),
    read("nan-scales", "masking covers V, also where the scale of an unused slot is NaN (§5)", "kv_token_head-*",
         weigh=unmasked_values),
    written("codes-wrap", "codes saturate (§5)", "kv_tensor/int8*",
            codes=lambda self, x: x.round().to(torch.int32).to(torch.int8)
            if self.dtype == torch.int8 else SchemeWrite.codes(self, x)),
    written("scale-of-zeros", "a token of zeros is stored with scale 0", "kv_token_head/*",
            scales=lambda self, scales: scales.clamp(min=1e-8)),
    written("scales-not-stored", "every array of the cache is written (§5)", "kv_block/*",
            keep=lambda self, held, slots, scales: None),
    written("one-scale-a-token", "kv_scheme block has a scale per 32 values (§5)", "kv_block/*",
            scales=lambda self, scales: scales.amax(-1, keepdim=True).expand_as(scales)
            if self.problem.kv_scheme == "block" else scales),
)  # fmt: skip
