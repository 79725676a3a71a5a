"""int4 rounding against the plain algorithm of the GPTQ paper, in NumPy, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgellm_ros.toolchain.quantize.rounding import choose_scales, round_columns, round_layers

GROUP = 16


def _case(num_out: int, num_in: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and correlated inputs (tokens, in) with some strong features."""
    random = np.random.default_rng(7)
    mix = random.normal(size=(num_in, num_in)) * random.lognormal(0, 1, num_in)
    return random.normal(size=(num_out, num_in)), random.normal(size=(6 * num_in, num_in)) @ mix * 0.1


def _plain_gptq(weight: np.ndarray, scale: np.ndarray, product: np.ndarray) -> np.ndarray:
    """Optimal brain quantisation in a fixed order: after each column the inverse of what is left is computed anew."""
    hessian = product / np.diagonal(product).mean() + 0.01 * np.eye(len(product))
    left = list(np.argsort(-np.diagonal(hessian)))
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
    expected = _plain_gptq(weight, np.repeat(scale, GROUP, 1), product)
    found = round_columns(torch.from_numpy(weight), torch.from_numpy(scale), torch.from_numpy(product))
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


def test_a_layers_output_changes_less_than_with_rounding_to_nearest_and_every_weight_is_a_multiple() -> None:
    weight, inputs = _case(24, 64)
    layer = torch.nn.Linear(64, 24, bias=False)
    layer.weight.data = torch.from_numpy(weight).float()
    text = torch.from_numpy(inputs).float()
    (_, scale), = round_layers({layer: None}, GROUP, lambda: layer(text))  # fmt: skip
    found = layer.weight.detach().double().numpy()
    codes = found / np.repeat(scale.numpy(), GROUP, 1)
    assert np.abs(codes - codes.round()).max() < 1e-4 and codes.min() > -8.1 and codes.max() < 7.1
    step = np.repeat(np.abs(weight).reshape(24, -1, GROUP).max(-1) / 7, GROUP, 1)
    nearest = np.clip(np.round(weight / step), -8, 7) * step
    lost, before = (np.square(inputs @ (rounded - weight).T).sum() for rounded in (found, nearest))
    assert lost < 0.6 * before, (lost, before)


def test_a_factor_of_the_input_counts_as_part_of_it() -> None:
    weight, inputs = _case(8, 32)
    factor = np.random.default_rng(1).lognormal(0, 1, 32)
    layers = [torch.nn.Linear(32, 8, bias=False) for _ in range(2)]
    for layer in layers:
        layer.weight.data = torch.from_numpy(weight).float()
    sizes = np.sqrt(np.square(inputs).mean(1, keepdims=True))  # tokens are scaled to one size before the factor
    first = torch.from_numpy(inputs / sizes).float()
    second = first * torch.from_numpy(factor).float()
    list(round_layers({layers[0]: torch.from_numpy(factor)}, GROUP, lambda: layers[0](first)))
    scale = choose_scales(torch.from_numpy(weight).float(), second.T @ second, GROUP)
    expected = round_columns(torch.from_numpy(weight).float(), scale, second.T @ second)
    assert float((layers[0].weight.detach() - expected).abs().max()) < 1e-4
