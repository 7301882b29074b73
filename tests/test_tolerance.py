"""The tolerance law on made-up results: what passes, what does not, and what the verdict says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from googlenet_fused.blocks import BasicConv2d
from googlenet_fused.randomize import randomize_
from googlenet_fused.tolerance import Comparison, check_close, compare, judge, references

NAN, INF = float("nan"), float("inf")
PEER_ERROR = 1e-3
"""Of values near 1: far above any rounding of fp32."""

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])


def truth_of(*shape: int) -> Tensor:
    """Values between 0.5 and 1.5, of either sign, the largest exactly 1.5."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(shape, generator=generator, dtype=torch.float64)
    size = size / size.max() + 0.5
    return size * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)


def noise(*shape: int) -> Tensor:
    """Between -1 and 1; the largest size is 1."""
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    return drawn / drawn.abs().max()


def verdict(error: Tensor, peer_error: Tensor, dtype: torch.dtype = torch.float64) -> Comparison:
    """Of results that err by so much from one truth."""
    truth = truth_of(*error.shape)
    return compare((truth + error).to(dtype), [(truth + peer_error).to(dtype)], truth)


# Errors.


@every_dtype
def test_torchs_own_result_passes(dtype: torch.dtype) -> None:
    truth = truth_of(2, 30)
    peer = (truth + PEER_ERROR * noise(2, 30)).to(dtype)
    comparison = compare(peer.clone(), [peer], truth)
    assert comparison.ok
    assert comparison.detail == ""
    assert comparison.max_error == comparison.peer_max_error > 0
    assert comparison.rms_error == comparison.peer_rms_error > 0


@every_dtype
def test_the_truth_passes(dtype: torch.dtype) -> None:
    truth = truth_of(2, 30)
    assert compare(truth.to(dtype), [truth.to(dtype)], truth).ok
    assert compare(truth.to(dtype), [(truth + 0.1).to(dtype)], truth).ok


@pytest.mark.parametrize(("factor", "ok"), [(0.5, True), (1.9, True), (2.1, False), (3.0, False), (-3.0, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twice_torchs_error_is_the_limit(dtype: torch.dtype, factor: float, ok: bool) -> None:
    error = PEER_ERROR * noise(2, 30)
    comparison = verdict(factor * error, error, dtype)
    assert comparison.ok is ok
    assert comparison.max_error == pytest.approx(abs(factor) * PEER_ERROR / 1.5, rel=1e-3)
    assert comparison.peer_max_error == pytest.approx(PEER_ERROR / 1.5, rel=1e-3)
    assert comparison.rms_error == pytest.approx(abs(factor) * comparison.peer_rms_error, rel=1e-3)


def test_one_bad_element_fails_and_is_named() -> None:
    peer_error, bad = PEER_ERROR * noise(2, 3, 10, 10), PEER_ERROR * noise(2, 3, 10, 10)
    bad[1, 2, 3, 4] = 4 * PEER_ERROR
    comparison = verdict(bad, peer_error)
    assert not comparison.ok
    truth = truth_of(2, 3, 10, 10)[1, 2, 3, 4].item()
    assert comparison.detail == f"at (1, 2, 3, 4) it is {truth + 4 * PEER_ERROR:.9g} where the truth is {truth:.9g}"
    assert comparison.rms_error < 2 * comparison.peer_rms_error, "no single element would be seen by this alone"


def test_many_middling_errors_fail() -> None:
    peer_error = torch.zeros(100, dtype=torch.float64)
    peer_error[7] = PEER_ERROR
    comparison = verdict(torch.full((100,), PEER_ERROR), peer_error)
    assert not comparison.ok
    assert comparison.detail == "its root mean square error is too large"
    assert comparison.max_error == pytest.approx(comparison.peer_max_error)


def test_a_constant_factor_fails() -> None:
    truth = truth_of(200)
    peer = truth * (1 + 1e-6 * noise(200))
    assert compare(truth * (1 + 1e-6 * noise(200).flip(0)), [peer], truth).ok
    assert not compare(truth * 1.0001, [peer], truth).ok


def test_the_worst_of_several_peers_counts() -> None:
    truth, error = truth_of(30), PEER_ERROR * noise(30)
    exact, rough = truth.clone(), truth + error
    assert not compare(truth + 1.9 * error, [exact], truth).ok
    for peers in ([exact, rough], [rough, exact]):
        comparison = compare(truth + 1.9 * error, peers, truth)
        assert comparison.ok
        assert comparison.peer_max_error == pytest.approx(PEER_ERROR / 1.5)
    assert not compare(truth + 2.1 * error, [exact, rough], truth).ok


@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_does_not_matter(dtype: torch.dtype, scale: float) -> None:
    truth, error = truth_of(50), 0.05 * noise(50)
    peer = ((truth + error) * scale).to(dtype)
    assert compare(((truth + 1.8 * error) * scale).to(dtype), [peer], truth * scale).ok
    bad = compare(((truth + 2.5 * error) * scale).to(dtype), [peer], truth * scale)
    assert not bad.ok
    assert bad.max_error == pytest.approx(2.5 * 0.05 / 1.5, rel=0.05)


# Roundings, where torch happens to be exact.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_passes_beside_an_exact_peer(dtype: torch.dtype) -> None:
    truth = truth_of(50).to(dtype).double()
    step = torch.finfo(dtype).eps * truth.abs()
    for roundings, ok in ((0.9, True), (4.0, False)):
        one = truth.clone()
        one[3] += roundings * step[3]
        assert compare(one.to(dtype), [truth.to(dtype)], truth).ok is ok
    everywhere = truth + 4 * step
    assert not compare(everywhere.to(dtype), [truth.to(dtype)], truth).ok


def test_a_rounding_is_of_the_element_itself() -> None:
    truth = torch.tensor([1024.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    at_the_large, at_the_small = truth.clone(), truth.clone()
    at_the_large[0] += 1024 * eps
    at_the_small[1] += 4 * eps
    assert compare(at_the_large.bfloat16(), [truth.bfloat16()], truth).ok
    assert not compare(at_the_small.bfloat16(), [truth.bfloat16()], truth).ok


def test_the_slack_of_fp64() -> None:
    truth = truth_of(50)
    for exponent, ok in ((-42, True), (-38, False)):
        one = truth.clone()
        one[3] += 1.5 * 2.0**exponent
        assert compare(one, [truth], truth).ok is ok
    assert not compare(truth.float().double(), [truth], truth).ok, "fp32 must not pass for fp64"


def test_long_sums_in_fp32_may_round_more() -> None:
    truth = truth_of(10_000).float().double()
    one = truth.clone()
    one[3] += 1.5 * 5e-6
    assert not compare(one.float(), [truth.float()], truth).ok
    assert compare(one.float(), [truth.float()], truth, terms=10_000).ok
    assert not compare(one.float(), [truth.float()], truth, terms=1_000).ok
    assert not compare((truth + 1.5 * 5e-6).float(), [truth.float()], truth, terms=10_000).ok, "but not everywhere"
    assert not compare(one, [truth], truth, terms=10_000).ok, "nor in fp64"


def test_half_precision_does_not_pass_for_fp32() -> None:
    truth = truth_of(400)
    peer = (truth * (1 + 1e-7 * noise(400))).float()
    assert not compare(truth.bfloat16().float(), [peer], truth, terms=2_000).ok
    assert not compare(truth.half().float(), [peer], truth, terms=2_000).ok


def test_zeros() -> None:
    zeros = torch.zeros(4, dtype=torch.float64)
    comparison = compare(zeros.float(), [zeros.float()], zeros)
    assert comparison == Comparison(True, 0.0, 0.0, 0.0, 0.0, "")
    wrong = zeros.clone()
    wrong[2] = 1e-20
    assert not compare(wrong.float(), [zeros.float()], zeros).ok


# NaN and infinity.


def special(**values: float) -> Tensor:
    tensor = truth_of(2, 6)
    for place, value in values.items():
        tensor[1, "abcdef".index(place)] = value
    return tensor


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@every_dtype
def test_the_same_special_values_pass(dtype: torch.dtype, value: float) -> None:
    result = special(b=value)
    comparison = compare(result.to(dtype), [result.to(dtype)], result)
    assert comparison.ok
    assert comparison.max_error < 0.01


@pytest.mark.parametrize(
    ("actual", "peer"),
    [
        ({}, {"c": NAN}),
        ({"c": NAN}, {}),
        ({"c": INF}, {}),
        ({}, {"c": -INF}),
        ({"c": NAN}, {"c": INF}),
        ({"c": INF}, {"c": NAN}),
        ({"c": INF}, {"c": -INF}),
        ({"b": NAN, "c": NAN}, {"b": NAN}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values_in_other_places_fail(dtype: torch.dtype, actual: dict[str, float], peer: dict[str, float]) -> None:
    theirs = special(**peer)
    comparison = compare(special(**actual).to(dtype), [theirs.to(dtype)], theirs)
    assert not comparison.ok
    assert comparison.detail.startswith("at (1, 2) it is ")
    assert comparison.detail.endswith(f"where torch's own is {theirs[1, 2].to(dtype).item()}")


def test_errors_beside_special_values_count() -> None:
    theirs, ours = special(b=NAN, d=INF), special(b=NAN, d=INF)
    ours[0, 4] += 0.1
    comparison = compare(ours.float(), [theirs.float()], theirs)
    assert not comparison.ok
    assert comparison.detail.startswith("at (0, 4) it is")


@pytest.mark.parametrize("value", [NAN, INF])
def test_where_the_truth_is_no_number_the_rest_still_counts(value: float) -> None:
    """Zero padding times infinity is NaN in one of torch's kernels and skipped in another."""
    theirs, truth = special(), special(b=value)
    assert compare(theirs.float(), [theirs.float()], truth).ok
    ours = theirs.clone()
    ours[0, 4] += 0.1
    assert not compare(ours.float(), [theirs.float()], truth).ok


def test_overflow_as_torch_overflows() -> None:
    truth = torch.tensor([1e6, 1.0, -1e6], dtype=torch.float64)
    half = truth.half()
    assert half.isinf().sum() == 2
    assert compare(half.clone(), [half], truth).ok
    assert not compare(torch.tensor([65504.0, 1.0, -65504.0]).half(), [half], truth).ok


def test_nothing_but_nan() -> None:
    truth = torch.full((3,), NAN, dtype=torch.float64)
    assert compare(truth.float(), [truth.float()], truth).ok


# Shapes and types.


def test_other_shapes_fail() -> None:
    truth = truth_of(2, 6)
    for actual, peer in ((truth[:1], truth), (truth, truth[:1]), (truth.T, truth), (truth[None], truth)):
        comparison = compare(actual, [peer], truth)
        assert not comparison.ok
        assert comparison.detail.startswith("shapes differ: ")
        assert str(list(actual.shape)) in comparison.detail


def test_another_dtype_fails() -> None:
    truth = truth_of(2, 6)
    comparison = compare(truth, [truth.float()], truth)
    assert not comparison.ok
    assert comparison.detail == "dtype is torch.float64, torch's own torch.float32"


@every_dtype
def test_empty_results_agree(dtype: torch.dtype) -> None:
    empty = torch.empty(0, 5, dtype=dtype)
    assert compare(empty, [empty], empty.double()).ok
    assert not compare(empty, [empty], torch.empty(0, 6, dtype=torch.float64)).ok
    assert not compare(empty, [empty.to(torch.int32)], empty.double()).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truth_must_be_fp64(dtype: torch.dtype) -> None:
    truth = truth_of(3).to(dtype)
    with pytest.raises(TypeError, match=f"truth must be float64, got {dtype}"):
        compare(truth, [truth], truth)


def test_a_peer_is_needed() -> None:
    with pytest.raises(ValueError, match="peers must hold at least one of torch's own results"):
        compare(truth_of(3), [], truth_of(3))


def test_results_with_gradients_in_any_layout() -> None:
    truth = truth_of(2, 3, 4, 5)
    actual = truth.float().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert compare(actual, [truth.float().transpose(0, 1).contiguous().transpose(0, 1)], truth).ok
    assert actual.grad_fn is None


# What is said.


def test_text_of_a_verdict() -> None:
    error = PEER_ERROR * noise(2, 30)
    good, bad = str(verdict(error, error)), str(verdict(3 * error, error))
    assert good == "agrees (relative error: largest 6.67e-04 against 6.67e-04 of torch's own, rms {0} against {0})".format(
        f"{verdict(error, error).rms_error:.2e}"
    )
    assert bad.startswith("disagrees: at (")
    assert "relative error: largest 2.00e-03 against 6.67e-04 of torch's own" in bad


def test_check_close_raises_with_the_label() -> None:
    truth = truth_of(2, 30)
    assert check_close(truth, [truth], truth).ok
    with pytest.raises(AssertionError, match=r"^result disagrees: at \("):
        check_close(truth + 1, [truth], truth)
    with pytest.raises(AssertionError, match=r"^logits disagrees: shapes differ"):
        check_close(truth[:1], [truth], truth, label="logits")


# judge.


def small_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    convs = BasicConv2d(3, 8, kernel_size=3, padding=1), BasicConv2d(8, 6, norm=None, kernel_size=5)
    return randomize_(nn.Sequential(*convs, nn.Flatten(), nn.Linear(24, 4))).to(dtype).eval()


@every_dtype
@pytest.mark.parametrize("batch", [0, 1, 3, 20])
def test_judge_accepts_the_plain_module(batch: int, dtype: torch.dtype) -> None:
    plain, x = small_net(dtype), torch.randn(batch, 3, 6, 6).to(dtype)
    assert judge(plain, plain, x).ok
    assert judge(lambda x: copy.deepcopy(plain).double()(x.double()).to(dtype), plain, x).ok


@every_dtype
def test_judge_refuses_a_wrong_module(dtype: torch.dtype) -> None:
    plain, x = small_net(dtype), torch.randn(2, 3, 6, 6).to(dtype)
    wrong = copy.deepcopy(plain)
    with torch.no_grad():
        wrong[1].conv.weight[2] *= 1.2
    assert not judge(wrong, plain, x).ok
    assert not judge(lambda x: plain(x) * 1.1, plain, x).ok
    assert not judge(lambda x: plain(x.flip(-1)), plain, x).ok
    assert not judge(lambda x: plain(x).flip(0), plain, x).ok
    assert not judge(lambda x: plain(x)[:1], plain, x).ok


def test_judge_leaves_everything_as_it_was() -> None:
    plain, x = small_net(), torch.randn(2, 3, 6, 6)
    tensors = (*plain.parameters(), *plain.buffers(), x)
    state, versions = copy.deepcopy(plain.state_dict()), [tensor._version for tensor in tensors]
    generator = torch.get_rng_state()
    seen: list[tuple[bool, bool]] = []

    def run(x: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return plain(x)

    with torch.autocast("cpu", torch.bfloat16):
        assert judge(run, plain, x).max_error < 1e-6, "judged in fp32, not under autocast"
    assert seen == [(False, False)]
    assert [tensor._version for tensor in tensors] == versions
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.dtype == state[name].dtype
    assert torch.equal(torch.get_rng_state(), generator)


@every_dtype
def test_references(dtype: torch.dtype) -> None:
    plain, x = small_net(dtype), torch.randn(3, 3, 6, 6).to(dtype)
    peers, truth, terms = references(plain, x)
    assert terms == 8 * 5 * 5
    assert truth.dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(truth, copy.deepcopy(plain).double()(x.double()))
        assert torch.equal(peers[0], plain(x))
    assert len(peers) >= 2
    for peer in peers:
        assert (peer.shape, peer.dtype) == (truth.shape, dtype)
        torch.testing.assert_close(peer, peers[0], rtol=0.1, atol=0.1)
