"""kernels/logprob.py against log_softmax and autograd in fp64, and that T x V logits never exist.

Every test runs on the PyTorch reference, which keeps exponentials for backward or recomputes them, and on the
Triton kernels, on a GPU where there is one.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import backend, logprob
from kernels.logprob import linear_logprob

T, V, C = 13, 37, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "recomputed", "kernels"], autouse=True)
def path(request, monkeypatch):
    if request.param == "kernels" and not backend.AVAILABLE:
        pytest.skip("needs triton")
    monkeypatch.setattr(backend, "fused", lambda x: request.param == "kernels")
    if request.param == "recomputed":
        monkeypatch.setattr(logprob, "KEPT_BYTES", 0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


def set_chunk(monkeypatch, columns, rows=T):
    monkeypatch.setitem(logprob.CHUNK_BYTES, DEVICE, 4 * rows * columns)


def reference(hidden_TC, weight_VC, targets_T, temperature=1.0):
    """In the dtype of its inputs; the tests pass fp64."""
    logp_TV = torch.log_softmax(hidden_TC @ weight_VC.T / temperature, dim=-1)
    return logp_TV.gather(-1, targets_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def inputs(rows=T, vocabulary=V, width=C, scale=1.0, seed=0):
    """hidden, weight, targets and the upstream gradients of logp and entropy; logits are about 2 x scale."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    hidden_TC, weight_VC = torch.randn(rows, width, generator=g), torch.randn(vocabulary, width, generator=g)
    targets_T = torch.randint(vocabulary, (rows,), generator=g)
    upstream = torch.randn(rows, generator=g), torch.randn(rows, generator=g)
    return hidden_TC, weight_VC * (2 * scale / math.sqrt(width)), targets_T, *upstream


def results_of(function, hidden_TC, weight_VC, targets_T, up_logp_T, up_entropy_T, temperature=1.0):
    """logp, entropy and the gradients for hidden and weight."""
    hidden_TC, weight_VC = (x.detach().clone().requires_grad_() for x in (hidden_TC, weight_VC))
    logp_T, entropy_T = function(hidden_TC, weight_VC, targets_T, temperature)
    loss = (logp_T * up_logp_T).sum() + (entropy_T * up_entropy_T).sum()
    return logp_T, entropy_T, *torch.autograd.grad(loss, (hidden_TC, weight_VC))


def exact_results(hidden_TC, weight_VC, *rest):
    """The same of `reference` in fp64."""
    return results_of(reference, hidden_TC.double(), weight_VC.double(), *rest)


def assert_close(results, expected, tolerance):
    """Relative norm of logp, entropy and both gradients."""
    for name, x, y in zip(("logp", "entropy", "grad_hidden", "grad_weight"), results, expected, strict=True):
        error = (x.double() - y).norm() / y.norm().clamp(min=1e-30)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


# -------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("columns", [0, 5, 36, V, 1000])
def test_values_and_gradients_equal_fp64_autograd(columns, temperature, monkeypatch):
    """Chunks of 1 (the least), 5 (the last of 2), 36 (the last of 1), all 37 and more columns; both upstream
    gradients."""
    set_chunk(monkeypatch, columns)
    results = results_of(linear_logprob, *inputs(), temperature)
    assert all(x.dtype == torch.float32 for x in results)
    assert_close(results, exact_results(*inputs(), temperature), 1e-5)


@pytest.mark.parametrize("used", ["logp", "entropy"])
def test_gradients_are_right_when_only_one_output_is_used(used, monkeypatch):
    """Both with a zero upstream gradient and with an output that is not part of the loss at all."""
    set_chunk(monkeypatch, 5)
    hidden, weight, targets, *upstream = inputs()
    i = ("logp", "entropy").index(used)
    upstream[1 - i], upstream[i][2:5] = torch.zeros(T), 0.0
    expected = exact_results(hidden, weight, targets, *upstream, 0.8)
    results = results_of(linear_logprob, hidden, weight, targets, *upstream, 0.8)
    assert_close(results, expected, 1e-5)
    hidden.requires_grad_(), weight.requires_grad_()
    output = linear_logprob(hidden, weight, targets, 0.8)[i]
    gradients = torch.autograd.grad((output * upstream[i]).sum(), (hidden, weight))
    assert_close((*results[:2], *gradients), expected, 1e-5)


def test_upstream_gradients_may_be_one_number_seen_many_times():
    """As of a plain sum, whose gradient is expanded: its rows have no memory of their own."""
    hidden, weight, targets, *_ = inputs()
    ones = torch.ones(T), torch.full((T,), 0.5)
    expected = results_of(linear_logprob, hidden, weight, targets, *ones, 0.8)
    hidden.requires_grad_(), weight.requires_grad_()
    logp, entropy = linear_logprob(hidden, weight, targets, 0.8)
    gradients = torch.autograd.grad(logp.sum() + 0.5 * entropy.sum(), (hidden, weight))
    assert_close(gradients + gradients, [x.double() for x in expected[2:] + expected[2:]], 1e-6)


def test_hidden_or_weight_alone_can_require_a_gradient():
    hidden, weight, targets, *upstream = inputs()
    expected = results_of(linear_logprob, hidden, weight, targets, *upstream)
    for x, gradient in ((hidden, expected[2]), (weight, expected[3])):
        x.requires_grad_()
        logp, entropy = linear_logprob(hidden, weight, targets)
        (logp * upstream[0] + entropy * upstream[1]).sum().backward()
        assert torch.equal(x.grad, gradient)
        x.requires_grad_(False)


def test_no_argument_or_upstream_gradient_is_changed_in_place(monkeypatch):
    set_chunk(monkeypatch, 5)
    given = inputs()
    kept = [x.clone() for x in given]
    hidden, weight, targets, *upstream = given
    hidden.requires_grad_(), weight.requires_grad_()
    outputs = linear_logprob(hidden, weight, targets, 0.8)
    torch.autograd.grad(outputs, (hidden, weight), upstream)
    assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True))


def test_a_uniform_distribution_has_logp_minus_log_v_and_entropy_log_v():
    """A known distribution, at any temperature: independent of the reference above."""
    hidden, weight, targets, *_ = inputs()
    logp, entropy = linear_logprob(torch.zeros_like(hidden), weight, targets, 0.8)
    assert torch.allclose(logp, torch.full((T,), -math.log(V)))
    assert torch.allclose(entropy, torch.full((T,), math.log(V)))


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_logits_of_ten_thousand_are_finite_and_right(temperature):
    """Logits +-1e4, exact in fp32: two equal maxima, one maximum far above, small differences on top of 1e4.

    Without the row's maximum subtracted first, probabilities sum to 1 +- 1e-3 (fp32's spacing at 1e4), and
    the entropy and both gradients are off by that times 1e4.
    """
    near = [10_000.0, 10_001.0, 10_002.0, 10_000.5, 9_999.0]
    equal, alone = [1e4, 1e4, -1e4, 0.0, -1e4], [-1e4, 0.0, 1e4, 0.0, 0.0]
    rows = [equal, equal, alone, near, [-z for z in near]]
    weight, targets = torch.eye(5), torch.tensor([0, 2, 2, 1, 4])
    case = torch.tensor(rows), weight, targets, torch.ones(5), torch.tensor([1.0, -1.0, 1.0, 0.5, 0.5])
    results = results_of(linear_logprob, *case, temperature)
    expected = exact_results(*case, temperature)
    assert all(x.isfinite().all() for x in results)
    absolute = 1e-4, 1e-4, 1e-4, 1.0  # the weight's gradient is a sum of terms of 1e4
    for x, y, atol in zip(results, expected, absolute, strict=True):
        assert torch.allclose(x.double(), y, rtol=1e-5, atol=atol), (x, y)
    assert (results[1] >= -1e-6).all() and (results[0] <= 1e-6).all()


# -------------------------------------------------------------------------------- bf16


def test_bf16_inputs_are_accumulated_in_fp32():
    """Within 1e-2 of fp64; logp and entropy 20 times better than bf16-rounded logits would give them."""
    hidden, weight, targets, *upstream = inputs(rows=64, vocabulary=300, width=128, scale=3.0)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    results = results_of(linear_logprob, hidden, weight, targets, *upstream, 0.8)
    assert [x.dtype for x in results] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    expected = exact_results(hidden, weight, targets, *upstream, 0.8)
    assert_close(results, expected, 1e-2)
    logits = (hidden.double() @ weight.double().T).bfloat16().double()
    rounded = reference(logits, torch.eye(300, dtype=torch.float64), targets, 0.8)
    for x, y, z in zip(results[:2], expected[:2], rounded, strict=True):
        error, error_if_rounded = (x - y).abs().max(), (z - y).abs().max()
        assert error < 1e-2 and error < error_if_rounded / 20, (error, error_if_rounded)


@pytest.mark.parametrize("path", ["reference"], indirect=True)  # one line of both
def test_the_hidden_gradient_of_bf16_inputs_is_summed_over_chunks_in_fp32(monkeypatch):
    """300 chunks of one column that add 1 each (1.002 in bf16, rounded or cut): a bf16 sum would stop growing
    at 256 of them."""
    columns = 301
    set_chunk(monkeypatch, 1, rows=1)
    hidden, weight = torch.zeros(1, 4, dtype=torch.bfloat16), torch.ones(columns, 4, dtype=torch.bfloat16)
    weight[0] = 0
    case = hidden, weight, torch.tensor([0]), torch.tensor([-1.002 * columns]), torch.zeros(1)
    _, _, grad_hidden, _ = results_of(linear_logprob, *case)
    assert torch.equal(grad_hidden.float(), torch.full((1, 4), 300.0))


# -------------------------------------------------------------------------------- rows that do not count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_used", [True, False])
def test_rows_without_upstream_gradient_get_exactly_zero_and_give_nothing(entropy_used, dtype, monkeypatch):
    """The weight's gradient is that of the counted rows alone."""
    set_chunk(monkeypatch, 4)
    hidden, weight, targets, up_logp, up_entropy = inputs()
    counted = torch.tensor([1, 0, 1, 1] + [0] * 4 + [0, 0, 0, 1] + [0], dtype=torch.bool)
    up_logp, up_entropy = up_logp * counted, up_entropy * counted * entropy_used
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    *_, grad_hidden, grad_weight = results_of(linear_logprob, hidden, weight, targets, up_logp, up_entropy)
    assert not grad_hidden[~counted].any() and grad_hidden[counted].abs().amax(-1).min() > 0
    changed = torch.where(counted[:, None], hidden, -3 * hidden)
    others = (targets + ~counted) % V
    *_, same = results_of(linear_logprob, changed, weight, others, up_logp, up_entropy)
    assert torch.equal(grad_weight, same)


def test_rows_beyond_the_last_id_are_as_if_they_were_not_there(monkeypatch):
    """The same as a slice of the weight; a target among them is refused."""
    set_chunk(monkeypatch, 5)
    torch.manual_seed(4)
    hidden, weight, targets = torch.randn(T, 8), torch.randn(23, 8), torch.randint(17, (T, ))
    seen = []
    for given, options in ((lambda w: w, {"n_valid": 17}), (lambda w: w[:17], {})):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = linear_logprob(h, given(w), targets, 0.8, **options)
        (logp.sin().sum() + entropy.sin().sum()).backward()
        seen.append((logp, entropy, h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*seen)) and not seen[0][3][17:].any()
    with pytest.raises(ValueError, match="target 17 is beyond the last id, 16"):
        linear_logprob(hidden, weight, targets.clone().fill_(17), n_valid=17)


@pytest.mark.parametrize("ignored", [[0, 3, 4], list(range(T)), [T - 1]])
def test_a_negative_target_is_ignored_and_costs_nothing(ignored, monkeypatch):
    """Logp and entropy are 0, gradients those of the other rows, whose head alone is computed."""
    hidden, weight, targets, *upstream = inputs()
    keep = torch.tensor([t for t in range(T) if t not in ignored], dtype=torch.int64)
    others = results_of(linear_logprob, hidden[keep], weight, targets[keep], *(x[keep] for x in upstream),
                        0.8)
    targets[ignored] = -100
    computed = []
    monkeypatch.setattr(logprob, "matmul_fp32", lambda a, b, *_: computed.append(len(a)) or a @ b.T)
    results = results_of(linear_logprob, hidden, weight, targets, *upstream, 0.8)
    logp, entropy, grad_hidden, grad_weight = results
    assert not logp[ignored].any() and not entropy[ignored].any() and not grad_hidden[ignored].any()
    for x, y in zip((logp[keep], entropy[keep], grad_hidden[keep], grad_weight), others, strict=True):
        assert torch.allclose(x, y, atol=1e-6)
    assert max(computed, default=0) <= max(V, len(keep))


def test_no_rows_at_all_work_forward_and_backward():
    hidden, weight, targets, *upstream = inputs(rows=0)
    logp, entropy, grad_hidden, grad_weight = results_of(linear_logprob, hidden, weight, targets, *upstream)
    assert logp.shape == entropy.shape == (0,) and grad_hidden.shape == (0, C)
    assert grad_weight.shape == (V, C) and not grad_weight.any()


def test_rows_of_a_padded_vocabulary_change_nothing_and_get_zero_gradient():
    hidden, weight, targets, *upstream = inputs()
    padded = torch.cat((weight, 9 * torch.ones(11, C))).requires_grad_()
    hidden.requires_grad_()
    logp, entropy = linear_logprob(hidden, padded[:V], targets, 0.8)
    grad_hidden, grad_padded = torch.autograd.grad((logp, entropy), (hidden, padded), upstream)
    assert grad_padded.shape == padded.shape and not grad_padded[V:].any()
    expected = exact_results(hidden, weight, targets, *upstream, 0.8)
    assert_close((logp, entropy, grad_hidden, grad_padded[:V]), expected, 1e-5)


@pytest.mark.parametrize("temperature", [0, 0.0, -0.5])
def test_a_temperature_that_is_not_positive_is_an_error_that_names_it(temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        linear_logprob(*inputs()[:3], temperature)


@pytest.mark.parametrize("path", ["reference"], indirect=True)
@pytest.mark.parametrize("device, vocabulary", [
    ("cpu", 151665), ("cuda", 151665), ("cuda", 152064), ("cuda", 5)])
def test_chunks_cover_the_vocabulary_once_and_are_aligned_on_a_gpu(device, vocabulary):
    parts = logprob.chunks(16384, vocabulary, torch.device(device))
    assert [i for part in parts for i in (part.start, part.stop)] == [
        0, *(i for part in parts[1:] for i in (part.start, part.start)), vocabulary]
    if device == "cuda":
        assert all((part.stop - part.start) % 8 == 0 or part.stop - part.start < 8 for part in parts)


def test_a_target_beyond_the_vocabulary_is_an_error_that_names_it():
    hidden, weight, targets, *_ = inputs()
    targets[3] = V
    with pytest.raises(ValueError, match=f"target {V} is beyond the last id, {V - 1}"):
        linear_logprob(hidden, weight, targets)


# -------------------------------------------------------------------------------- memory


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns: (numel, operation)."""

    def __init__(self):
        super().__init__()
        self.largest = (0, "nothing")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, (x.numel(), str(operation)))
        return out


@pytest.mark.parametrize("path", ["reference"], indirect=True)  # of the kernels a GPU tells: tests/gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [3, 50])
def test_no_tensor_is_larger_than_a_chunk_and_the_weight_forward_or_backward(columns, dtype, monkeypatch):
    """T x V is 12 weights and 10 of the larger chunks."""
    rows, vocabulary, width = 200, 512, 16
    bound = max(columns * rows, width * vocabulary)
    set_chunk(monkeypatch, columns, rows)
    hidden, weight, targets, *upstream = inputs(rows, vocabulary, width)
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    with LargestTensor() as forward:
        outputs = linear_logprob(hidden, weight, targets, 0.8)
    with LargestTensor() as backward:
        torch.autograd.grad(outputs, (hidden, weight), upstream)
    for largest in (forward.largest, backward.largest):
        assert columns * rows <= largest[0] <= bound, largest
    with LargestTensor() as naive:  # the instrument does see it
        torch.autograd.grad(reference(hidden, weight, targets), (hidden, weight), upstream)
    assert naive.largest[0] == rows * vocabulary
