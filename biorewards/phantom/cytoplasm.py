"""Actin and tubulin of the cells in the layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from biorewards.phantom.cells import Float, Int, Real
from biorewards.phantom.classes import NUCLEUS_AREA
from biorewards.phantom.population import Population
from biorewards.phantom.textures import Grain, Points, disc_points, splat, threads


def draw(
    rng: np.random.Generator, cells: Population, grain: Grain, labels: Int, score: Float, cover: Float
) -> tuple[Float, Float]:
    """Actin and tubulin (H, W), each about 1 in an untreated cell.

    labels (H, W): row of `cells` + 1; score (H, W) as `territories` gives it; cover (H, W): 1 where a nucleus lies.
    """
    owner = labels.astype(np.intp)
    inside = labels > 0
    inner = np.clip(1 - score, 0, 1)
    height = np.sqrt(inner * (2 - inner)) * inside  # of a dome over the outline
    radius = np.sqrt(np.bincount(labels.ravel(), minlength=len(cells.centre) + 1)[1:] / np.pi)

    def each(values: Float) -> Float:
        return np.concatenate([[0], values]).astype(np.float32).take(owner)

    # Ruffles: broad bright patches at the outline; elsewhere a thin line or nothing.
    edge = _edges(labels)
    wide = np.exp(-(((1 - score) / 0.25) ** 2))
    rim = 0.5 * np.square(np.square(np.square(wide))) + 0.2 * wide + 0.3 * edge
    rim = np.clip(0.45 + 0.9 * grain.coarse + 0.4 * grain.mid, 0.03, 3) * rim + 0.22 * edge
    actin = np.clip(1 + 0.07 * grain.mid + 0.12 * grain.fine + 0.3 * grain.coarse, 0.2, 3)
    actin *= 0.36 + 0.40 * height
    actin += each(cells.cortex) * rim
    actin += splat(_actin_points(rng, cells, labels, radius), labels.shape)
    actin *= inside
    actin *= each(cells.actin) * (1 - each(cells.actin_over_nucleus) * cover)

    tubulin = np.clip(1 + 0.08 * grain.mid + 0.12 * grain.coarse, 0.2, 3)
    tubulin *= each(cells.diffuse) * (0.35 + 0.65 * height)
    tubulin += each(cells.perinuclear) * np.clip(1 - 1.5 * score, 0, 1) * height
    tubulin += splat(_tubulin_points(rng, cells, labels, radius), labels.shape)
    tubulin *= inside
    tubulin *= each(cells.tubulin) * (1 - each(cells.tubulin_over_nucleus) * cover)
    return actin, tubulin


def _edges(labels: Int) -> Float:
    """1 on both sides of every border between labels, (H, W)."""
    edge = np.zeros(labels.shape, np.float32)
    down = labels[1:] != labels[:-1]
    right = labels[:, 1:] != labels[:, :-1]
    edge[1:] += down
    edge[:-1] += down
    edge[:, 1:] += right
    edge[:, :-1] += right
    return np.minimum(edge, 1)


def _points(at: Real, weight: Real) -> Points:
    return Points(at[:, 0].astype(np.float32), at[:, 1].astype(np.float32), weight.astype(np.float32))


def _repeat(rng: np.random.Generator, mean: Real) -> NDArray[np.intp]:
    """Each row as often as a Poisson number with its mean says."""
    return np.repeat(np.arange(len(mean)), rng.poisson(mean))


def _actin_points(rng: np.random.Generator, cells: Population, labels: Int, radius: Real) -> list[Points]:
    # Stress fibres: nearly straight, one main direction a cell.
    who = _repeat(rng, 9 * cells.fibres)
    main = rng.random(len(radius)) * np.pi
    start = cells.centre[who] + disc_points(rng, radius[who])
    heading = main[who] + rng.normal(0, 0.12, len(who)) + np.pi * rng.integers(0, 2, len(who))
    fibres = threads(rng, start, heading, who, rng.gamma(2.0, 0.16, len(who)), 0.012, labels, steps=28, step=1.4)
    # Dots.
    who = _repeat(rng, 12 * cells.puncta)
    dots = _points(cells.centre[who] + disc_points(rng, 1.05 * radius[who]), rng.gamma(1.5, 1.1, len(who)))
    # Aggregates: dots in tight groups.
    who, size = _repeat(rng, 5 * cells.clumps), 14
    middle = np.repeat(cells.centre[who] + disc_points(rng, 0.95 * radius[who]), size, 0)
    width = np.repeat(rng.uniform(0.8, 2.2, len(who)), size)[:, None]
    glow = np.repeat(rng.gamma(2, 0.6, len(who)), size)
    return [fibres, dots, _points(middle + width * rng.normal(0, 1, middle.shape), glow)]


def _tubulin_points(rng: np.random.Generator, cells: Population, labels: Int, radius: Real) -> list[Points]:
    nucleus = np.sqrt(NUCLEUS_AREA * cells.nucleus_area / np.pi)

    def filaments(kind: str, mean: Real, glow: float, wobble: float, steps: int) -> Points:
        who = _repeat(rng, mean)
        side = np.pi * rng.integers(0, 2, len(who))
        if kind == "along":  # anywhere, with the cell's long axis
            start = disc_points(rng, 0.9 * radius[who])
            heading = cells.axis[who] + rng.normal(0, 0.5, len(who)) + side
        else:  # from the nuclear envelope outwards, or round it
            turn = rng.random(len(who)) * 2 * np.pi
            away = nucleus[who] * rng.uniform(0.75, 1.25, len(who))
            start = (np.stack([np.sin(turn), np.cos(turn)], 1) * away[:, None]).astype(np.float32)
            heading = turn + rng.normal(0, 0.45, len(who))
            if kind == "round":
                heading += np.pi / 2 + side
        weight = glow * rng.gamma(2.0, 0.5, len(who))
        return threads(rng, cells.centre[who] + start, heading, who, weight, wobble, labels, steps=steps)

    size = np.clip(radius / 35, 0.3, 2) ** 1.6
    light = [
        filaments("out", 60 * size * cells.filaments, 0.26, 0.10, 22),
        filaments("round", 65 * size * cells.filaments, 0.26, 0.13, 18),
        filaments("along", 70 * size * cells.filaments, 0.26, 0.10, 20),
        filaments("out", 9 * size * cells.bundles, 1.3, 0.05, 16),
        filaments("round", 9 * size * cells.bundles, 1.3, 0.08, 18),
        filaments("along", 9 * size * cells.bundles, 1.3, 0.06, 16),
    ]
    # One spot beside the nucleus.
    who, dots = np.flatnonzero(cells.aggresome > 0.05), 60
    turn = rng.random(len(who)) * 2 * np.pi
    middle = cells.centre[who] + 1.05 * nucleus[who, None] * np.stack([np.sin(turn), np.cos(turn)], 1)
    at = np.repeat(middle, dots, 0) + rng.normal(0, 2.6, (dots * len(who), 2))
    light.append(_points(at, np.repeat(cells.aggresome[who] * rng.uniform(0.5, 1.5, len(who)), dots)))
    return light
