"""int4 rounding against the plain algorithm of the GPTQ paper, in NumPy, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgellm_ros.toolchain.quantize.products import parts_of, read_inputs
from edgellm_ros.toolchain.quantize.rounding import Corrections, choose_scales, round_columns, round_to_steps
from edgellm_ros.toolchain.quantize.scaling import choose_factor

GROUP = 16


def _case(num_out: int, num_in: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and correlated inputs (tokens, in) with some strong features."""
    random = np.random.default_rng(7)
    mix = random.normal(size=(num_in, num_in)) * random.lognormal(0, 1, num_in)
    return random.normal(size=(num_out, num_in)), random.normal(size=(6 * num_in, num_in)) @ mix * 0.1


def _plain_gptq(weight: np.ndarray, scale: np.ndarray, hessian: np.ndarray, order: list[int]) -> np.ndarray:
    """Optimal brain quantisation in a fixed order: after each column the inverse of what is left is computed anew."""
    left = list(order)
    work, rounded = weight.copy(), np.zeros_like(weight)
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        column = left[0]
        rounded[:, column] = np.clip(np.round(work[:, column] / scale[:, column]), -8, 7) * scale[:, column]
        error = (work[:, column] - rounded[:, column]) / inverse[0, 0]
        work[:, left] -= np.outer(error, inverse[0])
        left.pop(0)
    return rounded


def test_columns_are_rounded_as_the_paper_says() -> None:
    weight, inputs = _case(5, 160)  # more columns than one block
    product = inputs.T @ inputs
    scale = np.abs(weight).reshape(5, -1, GROUP).max(-1) / 7
    damped = product + 0.05 * np.diagonal(product).mean() * np.eye(len(product))
    expected = _plain_gptq(weight, np.repeat(scale, GROUP, 1), damped, list(np.argsort(-np.diagonal(product))))
    corrections = Corrections.of(torch.from_numpy(product))
    found = round_columns(torch.from_numpy(weight), torch.from_numpy(scale), corrections)
    assert np.abs(found.numpy() - expected).max() < 1e-6


def test_scales_are_the_best_of_those_tried_for_the_output() -> None:
    weight, inputs = _case(3, 32)
    found = choose_scales(torch.from_numpy(weight), torch.from_numpy(inputs.T @ inputs), GROUP).numpy()
    for row in range(3):
        for group in range(2):
            part, read = weight[row, group * GROUP :][:GROUP], inputs[:, group * GROUP :][:, :GROUP]
            tried = np.abs(part).max() / 7 * (0.5 + 0.05 * np.arange(12))
            lost = [((read @ (part - np.clip(np.round(part / s), -8, 7) * s)) ** 2).sum() for s in tried]
            assert found[row, group] == pytest.approx(tried[int(np.argmin(lost))])


def _nearest(weight: np.ndarray) -> np.ndarray:
    step = np.repeat(np.abs(weight).reshape(len(weight), -1, GROUP).max(-1) / 7, GROUP, 1)
    rounded: np.ndarray = np.clip(np.round(weight / step), -8, 7) * step
    return rounded


def _rounded(weight: np.ndarray, product: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scales and weights, as quantising a layer finds them."""
    scale = choose_scales(torch.from_numpy(weight).float(), product, GROUP)
    found = round_columns(torch.from_numpy(weight).float(), scale, Corrections.of(product))
    return scale.numpy(), found.double().numpy()


def test_a_layers_output_changes_less_than_with_rounding_to_nearest_and_every_weight_is_a_multiple() -> None:
    weight, inputs = _case(24, 64)
    product = torch.from_numpy(inputs.T @ inputs).float()
    scale, found = _rounded(weight, product)
    codes = found / np.repeat(scale, GROUP, 1)
    assert np.abs(codes - codes.round()).max() < 1e-4 and codes.min() > -8.1 and codes.max() < 7.1
    lost, before = (np.square(inputs @ (rounded - weight).T).sum() for rounded in (found, _nearest(weight)))
    assert lost < 0.6 * before, (lost, before)


def test_layers_that_read_one_tensor_share_its_product_and_every_token_counts_the_same() -> None:
    _, inputs = _case(1, 32)
    layers = [torch.nn.Linear(32, size, bias=False) for size in (4, 8, 6)]
    text = torch.from_numpy(inputs).float()

    def forward() -> None:
        for part in text.split(50):
            other = part * 2 + 1
            for layer in (layers[0], layers[1]):
                layer(part)
            layers[2](other)

    first, second = read_inputs(layers, forward)
    assert first.layers == layers[:2] and second.layers == layers[2:]
    for found, rows in ((first, inputs), (second, inputs * 2 + 1)):
        np.testing.assert_allclose(found.largest.numpy(), np.abs(rows).max(0), rtol=1e-6)
        rows = rows / np.sqrt(np.square(rows).mean(1, keepdims=True))
        np.testing.assert_allclose(found.product.numpy(), rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert list(parts_of(layers)) == [layers]


def test_rounding_weights_times_a_factor_is_rounding_them_to_steps_divided_by_it() -> None:
    """What lets AWQ's search try all factors at once, against the paper's algorithm on what is multiplied."""
    weight, inputs = _case(8, 32)
    factor = np.random.default_rng(1).lognormal(0, 0.3, 32)
    scale = np.abs(weight * factor).reshape(8, -1, GROUP).max(-1) / 7
    corrections = Corrections.of(torch.from_numpy(inputs.T @ inputs))
    wide = np.repeat(scale, GROUP, 1)
    found = round_to_steps(torch.from_numpy(weight), torch.from_numpy(wide.T / factor[:, None]), corrections).numpy()
    hessian = inputs.T @ inputs
    damped = hessian + 0.05 * np.diagonal(hessian).mean() * np.eye(32)
    expected = _plain_gptq(weight * factor, wide, damped / np.outer(factor, factor), corrections.order.tolist())
    np.testing.assert_allclose(found * factor, expected, atol=1e-9)


def test_a_factor_is_only_taken_where_the_rounded_layer_loses_less_with_it() -> None:
    """Weights that four bits hold exactly are best left alone; where a few features are all that is read, they are not."""
    random = np.random.default_rng(3)
    exact = random.integers(-7, 8, (32, 64)) * 0.1
    exact[:, ::GROUP] = 0.7
    _, inputs = _case(1, 64)
    product = torch.from_numpy(inputs.T @ inputs).float()
    kept = choose_factor([torch.from_numpy(exact).float()], product, Corrections.of(product), GROUP)
    assert torch.equal(kept, torch.ones(64))
    weight, inputs = random.normal(size=(32, 64)), random.normal(size=(400, 64))
    inputs[:, 5::GROUP] *= 30
    product = torch.from_numpy(inputs.T @ inputs).float()
    factor = choose_factor([torch.from_numpy(weight).float()], product, Corrections.of(product), GROUP).double().numpy()
    assert factor[5::GROUP].min() > 2 * np.delete(factor, np.s_[5::GROUP]).max()
    scaled = product / torch.from_numpy(np.outer(factor, factor)).float()
    with_it = _rounded(weight * factor, scaled)[1] / factor
    without = _rounded(weight, product)[1]
    lost, before = (np.square(inputs @ (rounded - weight).T).sum() for rounded in (with_it, without))
    assert lost < 0.7 * before, (lost, before)


def test_query_heads_that_share_a_value_get_one_factor() -> None:
    _, inputs = _case(1, 64)
    inputs[:, 5] *= 100
    product = torch.from_numpy(inputs.T @ inputs).float()
    weight = torch.from_numpy(np.random.default_rng(4).normal(size=(16, 64))).float()
    factor = choose_factor([weight], product, Corrections.of(product), GROUP, (2, 2, 16)).view(2, 2, 16)
    assert torch.equal(factor[:, 0], factor[:, 1]) and factor[0, :, 5].min() > factor[1].max()
