from __future__ import annotations

import os
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor

from geohooks.measures import LogitStats, compare_logits, compiled_sums, compiler_available, logit_stats

needs_compiler = pytest.mark.skipif(not compiler_available(), reason="no C++ compiler with Python's headers here")
# torch.compile's own imports and caches.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def pair(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator) * 2
    tuned = base + torch.randn(shape, generator=generator) * 0.3
    return tuned, base, torch.randint(0, shape[-1], shape[:-1], generator=generator)


def assert_same(left: object, right: object) -> None:
    others = attrs.asdict(right, recurse=False)  # type: ignore[call-overload]
    for name, value in attrs.asdict(left, recurse=False).items():  # type: ignore[call-overload]
        if isinstance(value, LogitStats):
            assert_same(value, others[name])
        elif isinstance(value, Tensor):
            torch.testing.assert_close(value, others[name], rtol=0, atol=1e-5, equal_nan=True, msg=name)


@needs_compiler
def test_compiled_agrees_with_eager_without_compiling_again_for_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    # The last is taken in chunks.
    for number, shape in enumerate([(3, 5, 2500), (2, 7, 3100), (1, 9, 5000), (40, 2200)]):
        tuned, base, targets = pair(*shape)
        if number == 3:
            monkeypatch.setattr(compiled_sums, "_BYTES", 8 * 2200 * 4)
        tuned[..., :4] = base[..., :4] = -torch.inf
        tuned[0, ..., 7] = -torch.inf
        base[-1, ..., 3] = torch.nan
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            assert_same(compare_logits(tuned, base, targets, compiled=True), compare_logits(tuned, base, targets))
            assert_same(logit_stats(tuned, targets, compiled=True), logit_stats(tuned, targets))
            half, strided = tuned.bfloat16(), base.mT.contiguous().mT
            assert_same(compare_logits(half, strided, targets, compiled=True), compare_logits(half, base, targets))
            less = compare_logits(tuned, base, targets, jensen_shannon=False, compiled=True)
            assert less.jensen_shannon is None
            assert_same(less, compare_logits(tuned, base, targets, jensen_shannon=False))


@needs_compiler
def test_compiled_gradients_and_equal_logits() -> None:
    tuned, base, _ = pair(3, 2500)
    tuned.requires_grad_()
    eager, compiled = (
        torch.autograd.grad(compare_logits(tuned, base, compiled=flag).jensen_shannon.sum(), tuned)[0]
        for flag in (False, True)
    )
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-8)
    same = compare_logits(base, base.clone(), compiled=True)
    for value in (same.forward_kl, same.reverse_kl, same.jensen_shannon, same.varentropy_change):
        assert torch.equal(value, torch.zeros(3))


def test_rows_narrower_than_a_block_need_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler_available():
        pytest.skip("no C++ compiler with Python's headers here")
    tuned, base, targets = pair(3, 1000)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = compare_logits(tuned, base, targets, compiled=True)
    assert torch.equal(found.forward_kl, compare_logits(tuned, base, targets).forward_kl)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    monkeypatch.setitem(os.environ, "CXX", "no-such-compiler")
    assert not compiler_available()
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler.*compiled=False"):
        logit_stats(torch.zeros(2, 3000), compiled=True)
