"""Makes quant/vq_tables.npy: the tables of the vq formats, fitted to normal deviates.

    python scripts/train_codebooks.py [OUT.npy]

Lloyd's algorithm on fresh deviates each round: the best codes as the formats search them, then the
entries that fit those codes best. The second plane starts as a fit to what the first leaves. The
tables are then rounded to the integer grid and their entries limited so that no sum of two goes
beyond 63. Takes about 10 minutes on one core and gives the same file every time on one machine.
"""

from __future__ import annotations

import sys

import numpy as np

from moelite.jit import kernel
from moelite.quant.base import F32, U8
from moelite.quant.vq_search import Slots, make_slots, new_room, prepare, search
from moelite.quant.vq_tables import FILE, LIMIT, PLANES, STEPS

SAMPLES = 1 << 19  # deviates of a round
ROUNDS = (40, 30)  # of a plane alone, of both together
TRIES = 16  # more than packing uses: the tables get 1 % better


@kernel
def _encode(slots, room, x, tries, codes):
    prepare(slots, np.eye(slots.width).astype(np.float32), room)
    for i in range(x.shape[0]):
        search(slots, room, x[i], tries, codes[i])


def encode(tables: list[F32], x: F32, tries: int) -> tuple[Slots, U8]:
    """The slots of these tables and the codes [n, slots] of x [n, width]."""
    slots = make_slots(tables)
    codes = np.zeros((len(x), len(slots.plane)), np.uint8)
    _encode(slots, new_room(slots), x, tries, codes)
    return slots, codes


def decode(slots: Slots, codes: U8) -> F32:
    """What codes stand for, [n, width]."""
    out = np.zeros((len(codes), slots.width), np.float32)
    for j, (plane, start, stop) in enumerate(
        zip(slots.plane, slots.start, slots.stop, strict=True)
    ):
        out[:, start:stop] += slots.entries[plane][codes[:, j], : stop - start]
    return out


def improve(tables: list[F32], x: F32, tries: int) -> None:
    """One round: codes for x, then each plane's entries as the means of what they stand for."""
    slots, codes = encode(tables, x, tries)
    for p, table in enumerate(tables):
        left = x - decode(make_slots(tables), codes)
        total, count = np.zeros(table.shape), np.zeros((len(table), 1))
        for j in np.nonzero(slots.plane == p)[0]:
            code = codes[:, j]
            want = left[:, slots.start[j] : slots.stop[j]] + table[code]
            for k in range(table.shape[1]):
                total[:, k] += np.bincount(code, want[:, k], len(table))
            count[:, 0] += np.bincount(code, minlength=len(table))
        np.divide(total, count, out=total, where=count > 0)
        table[...] = np.where(count > 0, total, table)


def limit(tables: list[F32]) -> None:
    """Clips entries so that no sum of one entry of each plane is beyond LIMIT steps."""
    sizes = np.array([np.abs(t).max() for t in tables])
    if sizes.sum() > LIMIT / STEPS:
        for table, size in zip(tables, sizes * (LIMIT / STEPS / sizes.sum()), strict=True):
            np.clip(table, -size, size, out=table)


def deviates(rng: np.random.Generator, width: int) -> F32:
    return rng.standard_normal((SAMPLES // width, width), np.float32)


def train(dims: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """int8 tables [256, d] for planes of these entry lengths."""
    rng, tables = np.random.default_rng(seed), []
    for d in dims:
        for i in range(ROUNDS[0]):
            x = deviates(rng, dims[0])
            if tables:
                x = x - decode(*encode(tables, x, 1))
            x = x.reshape(-1, d)
            if i == 0:
                found = [x[:256].copy()]
            improve(found, x, 1)
        tables.append(found[0])
    for _ in range(ROUNDS[1] if len(dims) > 1 else 0):
        improve(tables, deviates(rng, dims[0]), TRIES)
        limit(tables)
    return [np.rint(t * STEPS).astype(np.int8) for t in tables]


def main() -> None:
    """Trains all tables and writes them one after another."""
    found = []
    for name, dims in PLANES.items():
        tables = train(dims, len(found))
        x = deviates(np.random.default_rng(99), dims[0])
        back = decode(*encode([t / np.float32(STEPS) for t in tables], x, TRIES))
        print(f"{name}: {dims}, error {((x - back) ** 2).mean() / (x**2).mean():.5f}", flush=True)
        found += [t.reshape(-1) for t in tables]
    np.save(sys.argv[1] if len(sys.argv) > 1 else FILE, np.concatenate(found))


if __name__ == "__main__":
    main()
