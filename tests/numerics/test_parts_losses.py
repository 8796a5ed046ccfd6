"""Values and gradients of the part losses as the original computes them, all recorded cases; closed forms beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vissl_like.losses import affine as affine_module
from vissl_like.losses import parts
from vissl_like.losses.affine import Affine

DATA = Path(__file__).parents[1] / "data"
ARRAYS = np.load(DATA / "parts_losses.npz", allow_pickle=False)
SETTINGS = json.loads((DATA / "parts_losses.json").read_text())["settings"]
AFFINES = [Affine(item["angle"], *item["translate"], item["scale"]) for item in SETTINGS["aff"]]

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "concentration": lambda maps: parts.concentration(maps[:, :-1], square=True),
    "entropy": parts.pixel_wise_entropy,
    "total_variation_mean": parts.total_variation,
    "total_variation_sum": lambda maps: parts.total_variation(maps, reduction="sum"),
    **{
        f"presence_soft_constraint_beta{beta}": lambda maps, beta=beta: presence(maps, "soft_constraint", beta=beta)
        for beta in SETTINGS["beta"]
    },
    **{f"presence_{kind}": lambda maps, kind=kind: presence(maps, kind) for kind in ("original", "tanh", "soft_tanh")},
    **{
        f"enforced_presence_{kind}": lambda maps, kind=kind: parts.enforced_presence(maps[:, -1], kind=kind)
        for kind in parts.BACKGROUND_TYPES
    },
}


def presence(maps: Tensor, kind: str, *, beta: float = 0.1) -> Tensor:
    return parts.presence(parts.part_peaks(maps[:, :-1]), kind=kind, beta=beta)


def array(name: str) -> Tensor:
    return torch.from_numpy(ARRAYS[name])


def leaf(name: str) -> Tensor:
    return array(name).requires_grad_()


def check(value: Tensor, expected: str) -> None:
    torch.testing.assert_close(value, array(expected), rtol=1e-5, atol=1e-6)


def check_gradient(gradient: Tensor | None, expected: str) -> None:
    assert gradient is not None
    torch.testing.assert_close(gradient, array(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", SETTINGS["cases"])
@pytest.mark.parametrize("name", LOSSES)
def test_map_losses(name: str, case: str) -> None:
    maps = leaf(f"{case}/maps")
    loss = LOSSES[name](maps)
    loss.backward()
    check(loss.detach(), f"{case}/{name}/value")
    check_gradient(maps.grad, f"{case}/{name}/grad")


def test_every_recorded_loss_is_compared() -> None:
    recorded = {
        name.split("/")[1] for name in ARRAYS if name.split("/")[0] in SETTINGS["cases"] and name.endswith("/value")
    }
    elsewhere = {
        "orthogonality_parts",
        "orthogonality_ifam_trainer",
        *(f"equivariance_{number}" for number in range(len(AFFINES))),
    }
    assert recorded == set(LOSSES) | elsewhere


@pytest.mark.parametrize("case", SETTINGS["cases"])
def test_centroids_and_radial_weight(case: str) -> None:
    rows, columns = parts.centroids(array(f"{case}/maps"))
    check(rows, f"{case}/centroid_row")
    check(columns, f"{case}/centroid_col")
    expected = array(f"{case}/enforced_presence_radial_weight")[0, 0]
    weight = parts.radial_weight(*expected.shape, like=expected)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", SETTINGS["cases"])
@pytest.mark.parametrize(("name", "transposed"), [("orthogonality_parts", False), ("orthogonality_ifam_trainer", True)])
def test_orthogonality(name: str, transposed: bool, case: str) -> None:
    features = leaf(f"{case}/features")
    loss = parts.orthogonality(features, transposed=transposed)
    loss.backward()
    check(loss.detach(), f"{case}/{name}/value")
    check_gradient(features.grad, f"{case}/{name}/grad")


@pytest.mark.parametrize("case", SETTINGS["cases"])
@pytest.mark.parametrize("number", range(len(AFFINES)))
def test_equivariance_of_the_original(case: str, number: int) -> None:
    maps, others = leaf(f"{case}/maps"), leaf(f"{case}/equiv_maps")
    image_size = (SETTINGS["patch"] * maps.shape[2], SETTINGS["patch"] * maps.shape[3])
    back = affine_module.warp_back(others, AFFINES[number], image_size=image_size, method="nearest_two_step")
    name = f"{case}/equivariance_{number}"
    shift = affine_module.shift_in_cells(AFFINES[number], width=maps.shape[3], image_width=image_size[1])
    np.testing.assert_allclose(shift, ARRAYS[f"{name}/map_translate"], rtol=1e-9)
    torch.testing.assert_close(back.detach(), array(f"{name}/warped_back"), rtol=0, atol=0)
    loss = parts.equivariance(maps[:, :-1], back[:, :-1])
    loss.backward()
    check(loss.detach(), f"{name}/value")
    check_gradient(maps.grad, f"{name}/grad_maps")
    check_gradient(others.grad, f"{name}/grad_equiv_maps")


@pytest.mark.parametrize("number", range(len(AFFINES)))
def test_images_are_warped_as_the_original_does(number: int) -> None:
    warped = affine_module.warp(array("forward_warp/image"), AFFINES[number])
    torch.testing.assert_close(warped, array(f"forward_warp/{number}"), rtol=0, atol=1e-5)


def test_draws_of_the_original() -> None:
    for seed, angle, x, y, scale in array("affine_sampling").tolist():
        generator = torch.Generator().manual_seed(int(seed))
        drawn = affine_module.draw_affine(
            tuple(SETTINGS["img"]), degrees=90, translate=(0.11, 0.11), scale=(0.8, 1.4), generator=generator
        )
        assert (drawn.shift_x, drawn.shift_y) == (x, y)
        assert drawn.angle == pytest.approx(angle, rel=1e-6)
        assert drawn.scale == pytest.approx(scale, rel=1e-6)


# ------------------------------------------------------------------------------------------------ closed forms, float64
def halves(height: int = 4, width: int = 4) -> Tensor:
    """Two images, one part and the background: the part is the left half in the first, nowhere in the second."""
    part = torch.zeros(2, height, width, dtype=torch.float64)
    part[0, :, : width // 2] = 1
    return torch.stack([part, 1 - part], dim=1)


def test_values_by_hand() -> None:
    maps = halves()
    # One vertical edge of 4 rows in two channels of one of two images.
    assert float(parts.total_variation(maps)) == pytest.approx(2 * 4 / (2 * 16), rel=1e-12)
    # Rows 0..3 about 1.5, columns 0..1 about 0.5; 8 of 2*16 values count.
    spread = ((1.25 / 16) + (0.25 / 16)) * 8 / 32
    assert float(parts.concentration(maps[:, :1])) == pytest.approx(spread, rel=1e-12)
    assert float(presence(maps, "original")) == pytest.approx(1 - 2 / 3, rel=1e-12)
    assert float(presence(maps, "soft_constraint", beta=0.1)) == pytest.approx((1 / 3) * (0.9 * 2 / 3 + 0.1), rel=1e-12)
    assert float(presence(maps, "soft_tanh")) == pytest.approx(1 - np.tanh(2 / 3), rel=1e-12)
    assert float(presence(maps, "tanh")) == pytest.approx(-np.log(np.tanh(2 / 3)), rel=1e-12)
    background = maps[:, -1]
    assert float(parts.enforced_presence(background, kind="linear")) == pytest.approx(0.25, rel=1e-12)
    assert float(parts.enforced_presence(background, kind="mse")) == pytest.approx(0.125, rel=1e-12)
    assert float(parts.enforced_presence(background, kind="log")) == pytest.approx(-np.log(0.5) / 2, rel=1e-12)
    # A 2x2 grid of windows: every one is a corner; the best holds two thirds background, and all of it.
    assert float(parts.enforced_presence(background)) == pytest.approx(-np.log(2 / 3) / 2, rel=1e-12)
    assert float(parts.pixel_wise_entropy(torch.full((1, 4, 2, 2), 0.25).double())) == pytest.approx(
        np.log(4), rel=1e-12
    )
    assert float(parts.orthogonality(torch.eye(5, dtype=torch.float64)[None, :, :3])) == 0
    assert float(parts.orthogonality(torch.ones(1, 5, 2, dtype=torch.float64))) == pytest.approx(0.5, rel=1e-12)


def test_concentration_on_a_wide_grid_counts_in_its_sides() -> None:
    """Stretching the grid threefold leaves it about the same; the original's form does not."""
    narrow, wide = halves(12, 12)[:, :1], halves(12, 36)[:, :1]
    assert float(parts.concentration(wide)) == pytest.approx(float(parts.concentration(narrow)), rel=0.02)
    assert float(parts.concentration(wide, square=True)) > 1.5 * float(parts.concentration(narrow))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (3, 7), (1, 5)])
def test_small_grids_and_absent_parts_are_finite(size: tuple[int, int]) -> None:
    maps = torch.zeros(2, 3, *size, dtype=torch.float64)
    maps[:, -1] = 1  # no part anywhere
    maps.requires_grad_()
    losses = [
        parts.total_variation(maps),
        parts.concentration(maps[:, :-1]),
        parts.enforced_presence(maps[:, -1]),
        presence(maps, "original"),
        presence(maps, "soft_tanh"),
        presence(maps, "tanh"),
        parts.pixel_wise_entropy(maps),
        parts.equivariance(maps[:, :-1], maps[:, :-1]),
    ]
    total = torch.stack(losses).sum()
    total.backward()
    assert torch.isfinite(torch.stack(losses)).all()
    assert maps.grad is not None and torch.isfinite(maps.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_values(name: str) -> None:
    if name == "concentration" or name.startswith("presence_soft_constraint"):
        pytest.skip("a factor takes no gradient on purpose")
    maps = torch.rand(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert torch.autograd.gradcheck(LOSSES[name], (maps.requires_grad_(),))


def test_half_precision_is_raised() -> None:
    maps = array("a/maps")
    for loss in LOSSES.values():
        value = loss(maps.bfloat16())
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(maps), rtol=0.02, atol=0.02)


def test_autocast_changes_nothing() -> None:
    """Coordinates in bfloat16 would move images by pixels, similarities would lose their digits."""
    maps, image, size = array("a/maps"), array("forward_warp/image"), (98, 98)

    def everything() -> list[Tensor]:
        warps = [affine_module.warp(image, AFFINES[0])]
        warps += [
            affine_module.warp_back(maps, AFFINES[0], image_size=size, method=method)
            for method in ("bilinear", "nearest_two_step")
        ]
        losses = [loss(maps) for loss in LOSSES.values()]
        return [*warps, *losses, parts.orthogonality(array("a/features")), parts.equivariance(maps, warps[1])]

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        computed = everything()
    assert all(torch.equal(a, b) for a, b in zip(expected, computed))


# ------------------------------------------------------------------------------------------------------- warping back
def blobs(height: int, width: int) -> Tensor:
    """A smooth pattern without symmetry, zero at the border."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    one = torch.exp(-((x - 0.2) ** 2 + (y + 0.1) ** 2) / 0.03)
    return (one + 0.5 * torch.exp(-((x + 0.15) ** 2 + (y - 0.2) ** 2) / 0.02))[None, None]


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
@pytest.mark.parametrize("affine", [*AFFINES, Affine(40, 5, -3, 1.3)])
def test_warping_back_undoes_the_warp(affine: Affine, size: tuple[int, int]) -> None:
    """Also where height and width differ, at which the original's second step shifts by the wrong amount."""
    image = blobs(*size)
    back = affine_module.warp_back(affine_module.warp(image, affine), affine, image_size=size)
    assert float((back - image).abs().max()) < 0.06
    assert float(parts.equivariance(image, back)) < 0.002


def test_warping_back_on_a_coarser_grid() -> None:
    """A shift by 16 pixels is one by 4 cells of a map with a quarter of the side."""
    affine = Affine(0, 16, -8, 1)
    maps = blobs(16, 32)
    shifted = affine_module.warp(maps, Affine(0, 4, -2, 1))
    back = affine_module.warp_back(shifted, affine, image_size=(64, 128))
    torch.testing.assert_close(back[..., 2:, :28], maps[..., 2:, :28], rtol=0, atol=1e-5)


def test_positions_out_of_view_do_not_count() -> None:
    maps = torch.ones(1, 1, 8, 8)
    affine = Affine(0, 32, 0, 1)  # the right half leaves the image
    seen = affine_module.inside(maps, affine, image_size=(64, 64))
    assert torch.equal(seen[0, 0], torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], dim=1))
    back = affine_module.warp_back(maps, affine, image_size=(64, 64))
    assert float(parts.equivariance(maps, back)) > 0.1
    assert float(parts.equivariance(maps, back, inside=seen)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_of_maps_that_are_not_finite_is_not_a_number(bad: float) -> None:
    """It raised within PyTorch, so the loop could not say in which step the loss went wrong."""
    background = torch.full((2, 4, 4), 0.5)
    background[1, 2, 2] = bad
    assert parts.enforced_presence(background).isnan()
    assert parts.enforced_presence(background, kind="log").isnan()
