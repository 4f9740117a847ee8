"""Rules that hold for every public function: types, derivatives, transforms, NaN, empty batches, order of the batch."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from counterpoint import catalog
from counterpoint.core.precision import fast_bf16
from function_cases import CASES, OTHERS, Case

warnings.filterwarnings("ignore", message="CCA of .* rows")
EVERY = sorted(CASES)
LOSSES = [place for place in EVERY if CASES[place].through]
HALF = (torch.bfloat16, torch.float16)


def function_of(place: str) -> Any:
    module, _, name = place.partition(":")
    function = getattr(importlib.import_module(module), name)
    kwargs = dict(CASES[place].kwargs)
    return (lambda *args: function(*args, **kwargs)) if kwargs else function


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(case: Case, n: int, dtype: torch.dtype) -> list[Any]:
    """Return arguments rounded to this type; states of isogclr stay float32."""

    def rounded(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return [x if isinstance(x, dict) else tree_map(rounded, x) for x in case.make(n, draw)]


def as_double(args: list[Any]) -> list[Any]:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, args)


def floats(output: Any) -> list[Tensor]:
    return [x for x in tree_flatten(output)[0] if isinstance(x, Tensor) and x.is_floating_point()]


def first_loss(output: Any) -> Tensor:
    """Return the loss, or a number that holds all of what the function returns first."""
    several = floats(output)
    found = next((x for x in several if x.requires_grad), several[0])
    return (
        found
        if found.ndim == 0
        else (found.double() * torch.arange(1.0, found.numel() + 1).double().cos().view_as(found)).sum()
    )


def gradients(place: str, args: list[Any], autocast: torch.dtype | None = None) -> tuple[Any, list[Tensor]]:
    """Compute the output under autocast, and gradients outside of it, as PyTorch recommends."""
    case = CASES[place]
    args = list(args)
    for at in case.through:
        args[at] = args[at].detach().clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        output = function_of(place)(*args)
    through = [args[at] for at in case.through]
    found = torch.autograd.grad(first_loss(output), through, allow_unused=True) if through else []
    return output, [x if g is None else g for x, g in zip(through, found, strict=True) if g is not None]


def test_every_public_function_is_in_the_table():
    public = {place for entry in catalog.entries().values() for place in entry.functions}
    exempt = {place for place in public if place.rpartition(".")[2] in OTHERS}
    assert public - exempt == set(CASES)
    assert {place.rpartition(".")[2] for place in exempt} == set(OTHERS)


def compare(place: str, n: int, dtype: torch.dtype, *autocasts: torch.dtype | None) -> None:
    """Compare a function under each of these types of autocast with float64, which is computed once."""
    args = arguments(CASES[place], n, dtype)
    exact = gradients(place, as_double(args))
    for autocast in autocasts:
        near(place, dtype, autocast, gradients(place, args, autocast), exact)


def near(place: str, dtype: torch.dtype, autocast: torch.dtype | None, ours: Any, exact: Any) -> None:
    """Compare outputs and gradients with those in float64."""
    (found, slopes), (wanted, true) = ours, exact
    for ours, theirs in zip(floats(found), floats(wanted), strict=True):
        # A memory comes back in its own type; all that was computed is float32 at least.
        keeps = place.endswith((":mix", ":realign", ":realigned", ":moco", ":crd", ":dino", ":mae"))
        assert ours.dtype not in HALF or keeps, f"{place} returns {ours.dtype}"
        assert ours.ndim or ours.dtype not in HALF
        close(ours, theirs, max(4e-5, 2 * torch.finfo(ours.dtype).eps))
    for ours, theirs in zip(slopes, true, strict=True):
        assert ours.dtype is dtype or ours.ndim == 0
        # Where the CPU has bf16 instructions, autocast to bf16 rounds the factors of the gradients to 8 bits.
        rounded = 8e-3 if autocast is torch.bfloat16 and CASES[place].kernel and fast_bf16() else 2e-4
        close(ours, theirs, max(rounded, 2 * torch.finfo(ours.dtype).eps))


def close(ours: Tensor, theirs: Tensor, share: float) -> None:
    a, b = ours.detach().double(), theirs.detach().double()
    scale = float(b.abs().max()) if b.numel() else 1.0
    atol = share * max(scale, 1e-4)
    # PyTorch's comparison takes a hundred times as long as this one; it says what is wrong.
    if a.shape != b.shape or not bool(((a - b).abs() <= atol + share * b.abs()).all()):
        torch.testing.assert_close(a, b, rtol=share, atol=atol)


@pytest.mark.parametrize("place", EVERY)
def test_half_precision_and_autocast_equal_float64_on_the_same_inputs(place):
    case = CASES[place]
    for n in (8, 70, 300):
        for dtype, *autocasts in (
            (torch.float32, None, torch.bfloat16, torch.float16),
            (torch.bfloat16, None, torch.bfloat16),
            (torch.float16, None),
        ):
            if n <= case.most and not (n == 300 and dtype is torch.float16):
                compare(place, n, dtype, *autocasts)


@pytest.mark.parametrize("place", [place for place in EVERY if CASES[place].kernel])
def test_large_batches_under_autocast_equal_float64(place):
    n = 2100  # several tiles of the kernel in both directions, and a rest; twice as many rows are more than it keeps
    args = arguments(CASES[place], n, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = function_of(place)(*args)
    with torch.no_grad():
        wanted = function_of(place)(*as_double(args))
    for ours, theirs in zip(floats(found), floats(wanted), strict=True):
        close(ours, theirs, 1e-4)


@pytest.mark.parametrize("n", [7, 70])
@pytest.mark.parametrize("place", LOSSES)
def test_second_derivative_equals_finite_differences_or_is_refused(place, n):
    case = CASES[place]
    args = as_double(arguments(case, n, torch.float64))
    if isinstance(args[0], dict):
        args[0] = {name: x.double() for name, x in args[0].items()}
    function, at = function_of(place), case.through[0]
    way = draw(99, *args[at].shape)

    def energy(x: Tensor, *, graph: bool) -> Tensor:
        (slope,) = torch.autograd.grad(first_loss(function(*args[:at], x, *args[at + 1 :])), x, create_graph=graph)
        return slope.square().sum()

    x = args[at].clone().requires_grad_()
    refused = None
    try:
        value = energy(x, graph=True)
        found = torch.autograd.grad(value, x, materialize_grads=True)[0] if value.requires_grad else torch.zeros_like(x)
    except RuntimeError as error:
        refused = str(error)
    if refused is not None:
        assert "second derivative" in refused
        return
    step = 1e-6
    high, low = (energy((x.detach() + sign * step * way).requires_grad_(), graph=False) for sign in (1, -1))
    wanted = float(high - low) / (2 * step)
    assert float((found * way).sum()) == pytest.approx(
        wanted, rel=1e-4, abs=1e-6 * max(1.0, float(found.norm() * way.norm()))
    )


@pytest.mark.parametrize("place", LOSSES)
def test_torch_func_equals_autograd(place):
    case = CASES[place]
    for n in (8, 70):
        args = as_double(arguments(case, n, torch.float64))
        at = case.through[0]

        def loss(x: Tensor, args: list[Any] = args, at: int = at) -> Tensor:
            return first_loss(function_of(place)(*args[:at], x, *args[at + 1 :]))

        wanted = torch.autograd.grad(loss(x := args[at].clone().requires_grad_()), x)[0]
        close(torch.func.grad(loss)(args[at]), wanted, 1e-9)
        if n == 8:
            close(torch.func.jacrev(loss)(args[at]), wanted, 1e-9)
            several = torch.stack([args[at], args[at] * 1.01])
            try:
                found = torch.func.vmap(torch.func.grad(loss))(several)
            except RuntimeError as error:
                assert "cannot be mapped" in str(error)  # noqa: PT017
                continue
            for ours, x in zip(found, several, strict=True):
                close(ours, torch.func.grad(loss)(x), 1e-9)


@pytest.mark.parametrize(
    "place", [p for p in EVERY if p.endswith((":m3co_loss", ":clip", "core.nt_xent:nt_xent", ":crd"))]
)
def test_compiled_functions_equal_plain_ones(place):
    torch._dynamo.reset()
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    ways: list[Any] = []

    def both(graph, examples):
        """Run the traced graph as it is and by the second backend: the trace, which takes longest, is made once."""
        other = aot_eager(graph, examples)

        def run(*inputs):
            ways.append((graph(*inputs), other(*inputs)))
            return ways[-1][0]

        return run

    args = arguments(CASES[place], 70, torch.float32)
    found = torch.compile(function_of(place), backend=both)(*args)
    for ours, theirs in zip(floats(found), floats(function_of(place)(*args)), strict=True):
        close(ours, theirs, 2e-5)
    assert ways
    for plain, traced in ways:
        for ours, theirs in zip(floats(traced), floats(plain), strict=True):
            close(ours, theirs, 2e-5)


@pytest.mark.parametrize("place", LOSSES)
def test_nan_comes_out_as_nan_or_is_refused(place):
    case = CASES[place]
    for n in (8, 70):
        for at in case.through:
            args = arguments(case, n, torch.float32)
            if args[at].ndim == 0:
                args[at] = torch.tensor(math.nan)
            else:
                args[at] = args[at].clone()
                args[at][0] = math.nan
            try:
                output = function_of(place)(*args)
            except ValueError as error:
                assert "NaN" in str(error) or "positive" in str(error)  # noqa: PT017
                continue
            assert any(bool(x.isnan().any()) for x in floats(output))


@pytest.mark.parametrize("place", EVERY)
def test_narrow_integers_and_an_empty_batch_and_mixed_types(place):
    case, function = CASES[place], function_of(place)
    args = arguments(case, 8, torch.float32)

    def narrow(x: Any) -> Any:
        return x.int() if isinstance(x, Tensor) and x.dtype == torch.int64 else x

    for ours, theirs in zip(floats(function(*tree_map(narrow, args))), floats(function(*args)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    cut = [
        x if axis is None else tree_map(lambda t, a=axis: t.narrow(a, 0, 0), x)
        for x, axis in zip(args, [*case.batch, *[None] * (len(args) - len(case.batch))], strict=True)
    ]
    # A batch without a masked token counts 0; what returns a row for each row returns none.
    rowwise = (
        ":aggregate",
        ":identity_logits",
        ":mlm_distill",
        ":mix",
        ":mixed_targets",
        ":weighted_mean",
        ":realign",
        ":realigned",
        ":gradient_cosine",
        ":pixel_propagation",
        ":item_losses",
        ":memory_positives",
        ":similarity_guided_memory",
        ":token_relations",
        ":drop_redundant_tokens",
        ":attention_distance",
        ":attention_nmi",
    )
    if not place.endswith(rowwise):
        with pytest.raises(ValueError, match=r"\w"):
            function(*cut)
    operands = [
        at
        for at, x in enumerate(args)
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim and at not in case.memory
    ]
    if len(operands) > 1:
        args[operands[1]] = args[operands[1]].double()
        with pytest.raises(ValueError, match=r"float32.*float64"):
            function(*args)


@pytest.mark.parametrize("place", EVERY)
def test_a_temperature_must_be_positive_and_finite(place):
    module, _, name = place.partition(":")
    function = getattr(importlib.import_module(module), name)
    names = list(inspect.signature(function).parameters)
    args = arguments(CASES[place], 8, torch.float32)
    given = {**dict(zip(names, args, strict=False)), **dict(CASES[place].kwargs)}
    for wanted in (
        "temperature",
        "student_temperature",
        "teacher_temperature",
        "base_temperature",
        "logit_scale",
        "local_logit_scale",
    ):
        if wanted not in names:
            continue
        # A logit scale of 0 makes all logits equal, which Symile allows.
        for bad in (-0.1, math.inf, math.nan) if wanted.endswith("logit_scale") else (0.0, -0.1, math.inf, math.nan):
            with pytest.raises(ValueError, match=wanted):
                function(**(given | {wanted: bad}))


@pytest.mark.parametrize("place", [place for place in EVERY if CASES[place].permutes])
def test_permuting_the_batch_changes_no_loss(place):
    case, function = CASES[place], function_of(place)
    for n in (8, 70):
        args = arguments(case, n, torch.float64)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        turned = [
            x if axis is None else tree_map(lambda t, a=axis, order=order: t.index_select(a, order), x)
            for x, axis in zip(args, [*case.batch, *[None] * (len(args) - len(case.batch))], strict=True)
        ]
        scalars = [x for x in floats(function(*args)) if x.ndim == 0]
        found = [x for x in floats(function(*turned)) if x.ndim == 0]
        for ours, theirs in zip(found, scalars, strict=True):
            close(ours, theirs, 1e-9)


# ----------------------------------------------------------------------------------------------------------- one vocabulary

# Old spellings, and the word that a public signature has in their place.
OLD = {
    **dict.fromkeys(("tau", "temp", "T", "tau_min", "tau_max", "tau_init"), "temperature"),
    **dict.fromkeys(("log_inv_temperature", "log_inv_temp", "inv_temperature", "log_temperature"), "log_scale"),
    **dict.fromkeys(("scale", "h_scale", "h_logit_scale", "inverse_temperature"), "logit_scale"),
    **dict.fromkeys(("t", "tau_pos", "tau_neg"), "sharpness"),
    "tau_plus": "positive_prior",
    "positive_key": "positive",
    "pos": "positive",
    "negative_keys": "negatives",
    "neg": "negatives",
    "eps_sinkhorn": "epsilon",
    "iters": "iterations",
    "normalise": "normalize",
    "normalized": "normalize",
}


def signatures() -> dict[str, inspect.Signature]:
    """List the signatures of every public function and class of the catalogue and every loss."""
    from counterpoint import losses

    places = {place for entry in catalog.entries().values() for place in entry.functions}
    public = {
        place: getattr(importlib.import_module(place.partition(":")[0]), place.partition(":")[2]) for place in places
    }
    public |= {f"losses.{name}": getattr(losses, name) for name in dir(losses)}
    public |= {f"losses.{name}.forward": getattr(losses, name).forward for name in dir(losses)}
    return {name: inspect.signature(thing) for name, thing in public.items()}


# Functions whose parity cases name an argument by an old spelling.
NAMED_BY_CASES = {
    "class_texts:cosine_text_logits": {"scale"},
    "mlcd:margin_cluster_loss": {"scale"},
    "mlcd:mlcd_loss": {"scale"},
    "query_decoder:query_decoupled_decoder": {"pos"},  # a positional encoding
    "tracks:select_positive": {"t"},  # a frame
}


def test_no_public_signature_has_an_old_spelling():
    found = {
        f"{name}({parameter}): write {OLD[parameter]}"
        for name, signature in signatures().items()
        for parameter in signature.parameters
        if parameter in OLD and parameter not in NAMED_BY_CASES.get(name.rpartition(".")[2], set())
    }
    assert not found


def test_normalize_has_one_default():
    defaults = {
        name: signature.parameters["normalize"].default
        for name, signature in signatures().items()
        if "normalize" in signature.parameters
    }
    assert len(defaults) > 5
    assert set(defaults.values()) == {True}, defaults


def test_a_log_scale_and_a_logit_scale_say_what_they_are():
    for place in EVERY:
        module, _, name = place.partition(":")
        function = getattr(importlib.import_module(module), name)
        parameters = inspect.signature(function).parameters
        doc = " ".join((function.__doc__ or "").split())
        if "log_scale" in parameters and "rguments as" not in doc:
            assert "log(1 / temperature)" in doc, place
        if any(p.endswith("logit_scale") for p in parameters) and ":cl2l_terms" not in place and "Args:" in doc:
            assert "1 / temperature" in doc, place


# Functions that take no group, and why.
WITHOUT_GROUP = {
    "diswot:semantic_distance": "of the gradients that are given; the module gathers rows",
    "wscol:weak_guided_contrast": "of the rows that are given; the module gathers them",
    "macil-sd:info_nce": "of the rows that are given; the module gathers them",
    "macil-sd:topk_mil_pool": "bag by bag",
    "macil-sd:semi_bag_contrast": "of the bags that are given; the module gathers them",
    "hard-contrastive:contrastive": "of the similarities that are given; the module gathers them",
    "hard-contrastive:simple_contrastive": "of the similarities that are given; the module gathers them",
    "mochi:mixed_losses": "row by row",
    "crd:CRDLoss": "a module",
}


def test_every_loss_takes_a_group():
    from counterpoint import losses
    from counterpoint.losses.base import function_of

    calls = {getattr(losses, name).calls for name in dir(losses)}
    without = {call for call in calls if "group" not in inspect.signature(function_of(call)).parameters}
    assert without == set(WITHOUT_GROUP)
    for name in dir(losses):
        assert inspect.signature(getattr(losses, name)).parameters["group"].default is None
    for place in EVERY:
        module, _, name = place.partition(":")
        function = getattr(importlib.import_module(module), name)
        if "group" in inspect.signature(function).parameters:
            assert "'world' for all" in function.__doc__, place
