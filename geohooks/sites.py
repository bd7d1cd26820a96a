"""Names of places in a model, and selectors over them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import attrs

from geohooks.errors import SelectorError

__all__ = ["ATTENTION_KINDS", "BLOCK_KINDS", "HIDDEN_KINDS", "STACK_KINDS", "Site", "select"]

ATTENTION_KINDS = ("pattern", "cross_pattern")
STACK_KINDS = ("embedding", "final_norm")
BLOCK_KINDS = ("input", "attention", "cross_attention", "mlp", "output", "router", *ATTENTION_KINDS)
HIDDEN_KINDS = ("input", "attention", "cross_attention", "mlp", "output", *STACK_KINDS)

_SLICE = re.compile(r"\[(-?\d*):(-?\d*)(?::(-?\d*))?\]")


@attrs.frozen(order=False)
class Site:
    """A place where a tensor passes: `<stack>.<layer>.<kind>`, `<stack>.<kind>`, or `logits`.

    `str(site)` is its name and `Site.parse` reads it back.
    """

    stack: str | None
    layer: int | None
    kind: str

    def __str__(self) -> str:
        return ".".join(str(part) for part in (self.stack, self.layer, self.kind) if part is not None)

    @classmethod
    def parse(cls, name: str) -> Site:
        """The site called `name`; a `SelectorError` if it is not the name of one site."""
        parts = name.split(".")
        if len(parts) == 3 and parts[1].isdecimal():
            return cls(parts[0], int(parts[1]), parts[2])
        if len(parts) == 2 and parts[1] in STACK_KINDS:
            return cls(parts[0], None, parts[1])
        if len(parts) == 1 and name.isidentifier():
            return cls(None, None, name)
        raise SelectorError(
            f"'{name}' is not the name of one site; names are like 'decoder.3.output', 'decoder.embedding', 'logits'"
        )


def select(selectors: str | Site | Iterable[str | Site], sites: Sequence[Site]) -> tuple[Site, ...]:
    """The `sites` that any selector matches, in the order of `sites`.

    A selector is a `Site` or a string of dot-separated parts: a name, `*`, and for the layer also a
    number (negative ones count from the stack's end) or a slice `[a:b]`, `[a:b:c]`. `*` alone is every site.
    Raises `SelectorError`, naming the nearest sites that exist, for a selector that matches nothing.
    """
    if isinstance(selectors, (str, Site)):
        selectors = [selectors]
    depths: dict[str, int] = {}
    for site in sites:
        if site.stack is not None and site.layer is not None:
            depths[site.stack] = max(depths.get(site.stack, 0), site.layer + 1)
    chosen: set[Site] = set()
    for selector in selectors:
        if not isinstance(selector, (str, Site)):
            raise SelectorError(
                f"{selector!r} is not a selector; give a string such as 'decoder.*.output', or a geohooks.Site"
            )
        matched = {site for site in sites if _matches(str(selector), site, depths)}
        if not matched:
            raise SelectorError(_nothing_matched(str(selector), sites, depths))
        chosen |= matched
    return tuple(site for site in sites if site in chosen)


def _parts(selector: str) -> list[str]:
    return [selector] if not selector else re.split(r"\.(?![^\[]*\])", selector)


def _matches(selector: str, site: Site, depths: dict[str, int]) -> bool:
    if selector == "*":
        return True
    wanted = _parts(selector)
    actual = [part for part in (site.stack, site.layer, site.kind) if part is not None]
    if len(wanted) != len(actual):
        return False
    return all(
        _layer_matches(want, have, depths[str(site.stack)]) if isinstance(have, int) else want in ("*", have)
        for want, have in zip(wanted, actual, strict=True)
    )


def _layer_matches(wanted: str, layer: int, depth: int) -> bool:
    if wanted == "*":
        return True
    if found := _SLICE.fullmatch(wanted):
        start, stop, step = (int(part) if part else None for part in found.groups())
        if step == 0:
            raise SelectorError(f"'{wanted}' has a step of 0; use a step such as 1 or 2")
        return layer in range(depth)[slice(start, stop, step)]
    if re.fullmatch(r"-?\d+", wanted):
        return layer == (int(wanted) + depth if int(wanted) < 0 else int(wanted))
    return False


def _nothing_matched(selector: str, sites: Sequence[Site], depths: dict[str, int]) -> str:
    names = [str(site) for site in sites]
    nearest = difflib.get_close_matches(selector, names, n=4, cutoff=0.3) or names[:4]
    stacks = ", ".join(f"{stack} ({depth} layers)" for stack, depth in depths.items()) or "none"
    return (
        f"'{selector}' matches no site of this model; nearest are {', '.join(nearest) or 'none'}; "
        f"its stacks are {stacks}; list(host.anatomy.sites) names them all"
    )
